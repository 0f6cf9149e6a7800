"""Which number format the networks compute in."""

from typing import Literal

import torch

from kdav_fast.errors import InputError


def autocast_dtype(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype | None:
    """The autocast dtype of a run, or None for plain float32.

    Parameters, the embedding head and the loss stay in float32 in either case.

    Raises:
        InputError: bf16 on a GPU without it.
    """
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not has_bf16:
        name = torch.cuda.get_device_name(device)
        raise InputError(
            f"train.precision is 'bf16' but {name} has no bf16 arithmetic; use train.precision=fp32"
        )
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bf16 else None
    return torch.bfloat16 if precision == "bf16" else None


def check_image_dtype(images: Literal["fp32", "fp16", "bf16"], dtype: torch.dtype | None) -> None:
    """Raise `InputError` if networks that compute in `dtype` (None: float32) cannot take such images."""
    if images != "fp32" and dtype is None:
        raise InputError(
            f"data.dtype is '{images}' but the networks compute in fp32; use data.dtype=fp32 or train.precision=bf16"
        )


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """The context in which a network outside the engine (teacher, evaluation) runs."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
