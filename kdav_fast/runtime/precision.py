"""Which number format the networks compute in."""

from typing import Any, Literal

import torch
from torch import Tensor

from kdav_fast.errors import InputError

SMALLEST_BF16_IMAGE = 32
"""Pixels a side from which bf16 was faster on a CPU, for networks of every size tried (docs/precision.md)."""
Format = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Format, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: Literal["auto", Format], device: torch.device, image_size: int) -> Format:
    """What `auto` stands for: bf16 where it is faster, the same whenever this machine is asked; others as they are.

    Args:
        precision: as in a config.
        device: where the networks compute.
        image_size: pixels a side.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if has_bf16(device) else "fp32"
    return "bf16" if cpu_has_bf16() and image_size >= SMALLEST_BF16_IMAGE else "fp32"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 by instructions of its own, which torch knows how to use."""
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has_instructions and torch.backends.mkldnn.is_available()


def has_bf16(device: torch.device) -> bool:
    """Whether networks can compute in bf16 there; any CPU can, if need be slowly."""
    return device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)


def autocast_dtype(
    precision: Format, device: torch.device, key: str = "train.precision"
) -> torch.dtype | None:
    """The autocast dtype of a run, or None for plain float32; `key` is what messages call `precision`.

    Parameters, the embedding head and the loss stay in float32 in any case.

    Raises:
        InputError: bf16 on a GPU without it.
    """
    if precision == "bf16" and not has_bf16(device):
        name = torch.cuda.get_device_name(device)
        raise InputError(f"{key} is 'bf16' but {name} has no bf16 arithmetic; use {key}=fp16 or fp32")
    return None if precision == "fp32" else DTYPES[precision]


def check_image_dtype(
    images: Literal["fp32", "fp16", "bf16"], dtype: torch.dtype | None, key: str = "train.precision"
) -> None:
    """Raise `InputError` if networks cannot take such images; `key` gave them `dtype` (None: float32)."""
    if images != "fp32" and dtype is None:
        raise InputError(
            f"data.dtype is '{images}' but {key} lets the networks compute in fp32; use data.dtype=fp32, or "
            f"{key}=bf16 or fp16"
        )


def dtype_name(dtype: torch.dtype | None) -> Format:
    """What the config calls an autocast dtype."""
    return next(name for name, known in DTYPES.items() if known == (dtype or torch.float32))


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """The context in which a network outside the engine (teacher, evaluation) runs."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


class LossScale:
    """What a loss is multiplied by before the backward pass, so that small gradients do not vanish in float16.

    Halved after a skipped step, down to 1; doubled after 2,000 steps without one, up to 2^24. Always 1 for other
    dtypes, whose range is float32's. It stays on the device, as does what decides about it.

    Args:
        dtype: autocast dtype of the networks; None for float32.
        device: where the loss is.
    """

    GROWTH_INTERVAL = 2000
    LARGEST = 2.0**24

    def __init__(self, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> None:
        self.active = dtype == torch.float16
        self.factor = torch.full((), 2.0**16 if self.active else 1.0, device=device)
        """Scalar, float32."""
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    @property
    def value(self) -> float:
        """The factor as a number; waits for the device."""
        return self.factor.item()

    def update(self, taken: Tensor) -> None:
        """After each step, whether it was taken or skipped: scalar, boolean."""
        if self.active:
            skipped = (~taken).float()
            torch._amp_update_scale_(self.factor, self._good_steps, skipped, 2.0, 0.5, self.GROWTH_INTERVAL)
            self.factor.clamp_(1.0, self.LARGEST)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "good_steps": self._good_steps.item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.active:
            self.factor.fill_(state["value"])
            self._good_steps.fill_(state["good_steps"])
