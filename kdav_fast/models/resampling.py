"""Weights made for one image size in a network made for another: position embeddings, resampled by the library."""

import sys
from collections.abc import Callable

from torch import Tensor, nn

Resampling = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]
"""From weights and the network that they are for to weights that fit it."""


def timm_resampling(network: nn.Module) -> Resampling | None:
    """What timm does to weights when it loads them into such a network."""
    return getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)


def torchvision_resampling(name: str) -> Resampling | None:
    """As `timm_resampling`: vision transformers only."""
    return _interpolate if name.startswith("vit_") else None


def _interpolate(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    from torchvision.models.vision_transformer import (
        interpolate_embeddings,
    )  # only where a run needs the library

    return dict(interpolate_embeddings(network.image_size, network.patch_size, dict(state)))
