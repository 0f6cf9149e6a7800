"""How pixels in 0..1 are centred and scaled before a network sees them, and from one such way to another."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Normalization(NamedTuple):
    """Per-channel RGB `mean` and `std` of pixels in 0..1: a network sees `(pixels - mean) / std`."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class Renormalize(nn.Module):
    """B x 3 x H x W images normalised one way to the same images normalised another way.

    One affine per channel, `images * scale + shift`, without going back to pixels; dtype and memory format
    stay. It has no state: a checkpoint of the network behind it does not change.

    Args:
        given: what the images were normalised with.
        wanted: what the network's weights expect.
    """

    def __init__(self, given: Normalization, wanted: Normalization) -> None:
        super().__init__()
        given_mean, given_std, wanted_mean, wanted_std = (
            torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (*given, *wanted)
        )
        self.register_buffer("scale", (given_std / wanted_std).float(), persistent=False)
        self.register_buffer("shift", ((given_mean - wanted_mean) / wanted_std).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift.to(images.dtype), images, self.scale.to(images.dtype))


def renormalization(given: Normalization, wanted: Normalization) -> nn.Module:
    """`Renormalize`, or `nn.Identity` where there is nothing to do."""
    return nn.Identity() if given == wanted else Renormalize(given, wanted)
