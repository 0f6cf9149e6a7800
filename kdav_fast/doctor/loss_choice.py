"""Which implementation of the loss `impl: auto` takes for a user's sizes: a finding for `kdav doctor`."""

from typing import NamedTuple

import torch

from kdav_fast.doctor.findings import Finding
from kdav_fast.errors import InputError
from kdav_fast.kernels.dispatch import Posterior, explain_choice
from kdav_fast.runtime.precision import DTYPES, Format


class LossShape(NamedTuple):
    """Sizes that decide: batch B, embedding width d, memory length L, classes K (DESIGN section 2)."""

    batch: int
    width: int
    length: int
    classes: int


def parse_loss_shape(text: str) -> LossShape:
    """`B,d,L,K` as on the command line; raises `InputError` for anything else."""
    try:
        shape = LossShape(*(int(part) for part in text.split(",")))
    except (TypeError, ValueError):
        shape = None
    if shape is None or min(shape) < 1:
        raise InputError(
            f"--loss-shape is {text!r}; give batch, embedding width, memory length and classes as B,d,L,K, "
            "such as 256,512,16384,1000"
        )
    return shape


def loss_finding(shape: LossShape, dtype: Format, posterior: Posterior) -> Finding:
    """What `auto` takes on this machine, and why.

    Args:
        shape: sizes.
        dtype: "fp32", "bf16" or "fp16", of the embeddings.
        posterior: what the memory keeps, "dense" or "ids".
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, reason = explain_choice(device, *shape, DTYPES[dtype], posterior)
    sizes = "B {}, d {}, L {}, K {}".format(*shape)
    return Finding(
        "kernels",
        "kdav_loss impl=auto",
        "info",
        f"{name} for {sizes}, {dtype}, {posterior} on {device}: {reason}",
    )
