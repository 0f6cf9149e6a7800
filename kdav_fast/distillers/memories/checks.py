"""What every memory asks of its arguments."""

from numbers import Integral

import torch
from torch import Tensor

from kdav_fast.errors import InputError


def check_sizes(memory: str, **sizes: int) -> None:
    """Raise `InputError` unless all are whole numbers from 1 on."""
    for name, value in sizes.items():
        if not isinstance(value, Integral):
            raise InputError(f"{memory}: {name} is {value!r}; it must be a whole number")
        if value < 1:
            raise InputError(f"{memory}: {name} is {value}; it must be at least 1")


def check_valid(method: str, valid: Tensor, batch: int) -> None:
    """Raise `InputError` unless it says of each row whether it counts."""
    if valid.dtype != torch.bool or valid.shape != (batch,):
        raise InputError(
            f"{method}: valid is {valid.dtype} of shape {tuple(valid.shape)}; needed: {batch} booleans"
        )


def check_range(method: str, what: str, numbers: Tensor, end: int, reason: str) -> None:
    """Raise `InputError` unless all are in 0 .. end - 1.

    On an accelerator a number outside is an assertion that fails on the device: nobody waits for its outcome.
    """
    outside = (numbers < 0) | (numbers >= end)
    if numbers.device.type != "cpu":
        torch._assert_async(~outside.any())
    elif outside.any():
        raise InputError(f"{method}: {what} is {numbers[outside][0]}; needed: 0 to {end - 1}, as {reason}")
