"""What every memory asks of its arguments, and of the machine."""

import os
from numbers import Integral

import psutil
import torch
from torch import Tensor

from kdav_fast.errors import InputError

_GIB = 2**30


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of the GPU's, or its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def require_room(what: str, needed: int, device: torch.device, remedy: str) -> None:
    """Raise `InputError` unless so many bytes are free.

    Args:
        what: takes them.
        needed: bytes.
        device: on which; it is made on the host.
        remedy: what to do.
    """
    for place in {device.type: device, "cpu": torch.device("cpu")}.values():
        if needed > (free := free_memory(place)):
            where = "of the GPU's memory" if place.type == "cuda" else "of memory a process"
            raise InputError(
                f"{what} need {needed / _GIB:.1f} GiB, but {free / _GIB:.1f} GiB {where} are free; {remedy}"
            )


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
