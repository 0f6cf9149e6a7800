"""A teacher whose weights are random: a step takes as long with it, and nobody looks at what is learnt."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from kdav_fast.models import build_classifier


def write_random_teacher(name: str, classes: int, path: Path) -> None:
    """Write a safetensors file of the network's weights, always the same ones.

    Raises:
        InputError: the network's name is unknown.
    """
    torch.manual_seed(1)
    weights = build_classifier(name, classes).stock_state_dict()
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path)
