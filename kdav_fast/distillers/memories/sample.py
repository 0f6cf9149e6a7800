"""What a method remembers of every training image, by the image's index."""

from collections.abc import Callable

import torch
from torch import Tensor

from kdav_fast.distillers.memories.checks import (
    check_range,
    check_sizes,
    check_valid,
    free_memory,
    require_room,
)
from kdav_fast.distillers.memories.gather import Gathering
from kdav_fast.distillers.memories.memory import Memory
from kdav_fast.errors import InputError

_GIB = 2**30
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHARE_OF_DEVICE = 0.5
"""Of the free device memory, at most: the rest is for what training allocates later."""


class SampleMemory(Memory):
    """A row for each of N images, the one given last, the same on every rank.

    It never grows: each process holds (N + 1) x (width x bytes of a value + 1) bytes, `nbytes`. All state is in
    buffers, so `state_dict` and `load_state_dict` save and restore it exactly. The rows keep their dtype whatever
    a parent module is cast to.

    On the device, nothing waits for it. On the host of a device, the memory stays there wherever a parent module is
    moved; only the rows in question cross, and `update`, `rows` and `seen` wait for the device, as the host must know
    which rows these are.

    Args:
        rows: N, images of the training split.
        width: values of a row.
        dtype: in which they are kept; a value beyond its range is not finite.
        device: on which the batches are; None is torch's default.
        host: whether the memory lies on the device's host instead; None: where it would take more than half of the
            device memory that is free now.
        remedy: what the user is told to do where it does not fit.

    Raises:
        InputError: a size that is no whole number or below 1, another dtype than float16, bfloat16, float32 or
            float64, or it does not fit.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        host: bool | None = None,
        remedy: str = "use fewer rows or a smaller width",
    ) -> None:
        super().__init__()
        check_sizes("SampleMemory", rows=rows, width=width)
        if not dtype.is_floating_point:
            raise InputError(
                f"SampleMemory: dtype is {dtype}; allowed: torch.float16, bfloat16, float32, float64"
            )
        self.width, self._count = width, rows
        device = torch.get_default_device() if device is None else torch.device(device)
        self.on_host = self._chosen_host(device, dtype, host, remedy)
        where = torch.device("cpu") if self.on_host else device
        # One row more than images: rows that must not be remembered are written there, so that an update has fixed
        # shapes and needs no answer from the device.
        self.register_buffer("_values", torch.zeros(rows + 1, width, dtype=dtype, device=where))
        self.register_buffer("_seen", torch.zeros(rows + 1, dtype=torch.bool, device=where))

    def __len__(self) -> int:
        """N."""
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes that this process holds."""
        return self._values.nbytes + self._seen.nbytes

    @torch.no_grad()
    def update(self, index: Tensor, values: Tensor, valid: Tensor | None = None) -> None:
        """Remember a batch, gathered from all ranks in rank order when torch.distributed is up.

        Every rank must give the same number of rows. Rows that are not valid, or not finite in the memory's dtype, are
        left out. Of several rows of one image, the last counts.

        Args:
            index: B int64, which image each row is of.
            values: B x width, floating.
            valid: B booleans; `None` means all.

        Raises:
            InputError: shapes or kinds that do not fit this memory, or a valid row's index outside 0 .. N - 1; on an
                accelerator such an index is an assertion that fails on the device.
        """
        self._check_index("update", index)
        batch = len(index)
        if values.shape != (batch, self.width) or not values.is_floating_point():
            raise InputError(
                f"SampleMemory.update: values is {values.dtype} of shape {tuple(values.shape)}; needed: "
                f"{batch} x {self.width}, floating"
            )
        if valid is not None:
            check_valid("SampleMemory.update", valid, batch)
            index = index.where(valid, 0)
        self._check_range("update", index)
        kept = values.to(self._values.dtype)
        keep = kept.isfinite().all(1)
        if valid is not None:
            keep &= valid
        index, kept, keep = (
            _moved(column, self._values.device) for column in Gathering(index, kept, keep).rows()
        )

        spare = len(self)
        slot, source = index.where(keep, spare).sort(stable=True)
        last = torch.ones_like(keep)
        last[:-1] = slot[1:] != slot[:-1]
        slot = slot.where(last, spare)
        self._keep(slot, self._values, self._seen)
        self._values[slot] = kept[source]
        self._seen.index_fill_(0, slot, True)
        # Slices: a number written to a single element would be copied from the host, which waits for the device.
        self._values[spare:] = 0
        self._seen[spare:] = False

    @torch.no_grad()
    def begin_uniform(self, bound: float) -> None:
        """Values in -bound .. bound for images of which nothing is remembered yet, by torch's seed."""
        self._values[:-1].uniform_(-bound, bound)

    def rows(self, index: Tensor) -> Tensor:
        """What is remembered of B images: B x width, on the device of `index`, halves widened to float32.

        Zeros where nothing is, or what `begin_uniform` gave.

        Args:
            index: B int64.

        Raises:
            InputError: no such index, or one outside 0 .. N - 1; on an accelerator as in `update`.
        """
        rows = self._at("rows", self._values, index)
        return rows if rows.dtype == torch.float64 else rows.float()

    def seen(self, index: Tensor) -> Tensor:
        """Of which of B images anything is remembered: B booleans, on the device of `index`.

        Args:
            index: B int64.

        Raises:
            InputError: as in `rows`.
        """
        return self._at("seen", self._seen, index)

    def _at(self, method: str, buffer: Tensor, index: Tensor) -> Tensor:
        self._check_index(method, index)
        here = _moved(index, buffer.device)
        self._check_range(method, here)
        return _moved(buffer.index_select(0, here), index.device)

    def _check_index(self, method: str, index: Tensor) -> None:
        if index.dtype != torch.int64 or index.ndim != 1:
            raise InputError(
                f"SampleMemory.{method}: index is {index.dtype} of shape {tuple(index.shape)}; needed: B int64 numbers"
            )

    def _check_range(self, method: str, index: Tensor) -> None:
        check_range(
            f"SampleMemory.{method}", "an index", index, len(self), f"the memory has {len(self)} rows"
        )

    def _chosen_host(self, device: torch.device, dtype: torch.dtype, host: bool | None, remedy: str) -> bool:
        """Whether the memory shall lie on the host; raises `InputError` where it does not fit."""
        needed = (self._count + 1) * (self.width * dtype.itemsize + 1)
        what = f"SampleMemory: {self._count} x {self.width} values of {dtype}"
        if device.type == "cuda" and not host:
            free = free_memory(device) * _SHARE_OF_DEVICE
            if needed <= free:
                return False
            if host is False:
                raise InputError(
                    f"{what} need {needed / _GIB:.1f} GiB, but half of the free GPU memory is "
                    f"{free / _GIB:.1f} GiB; use host=None, or {remedy}"
                )
        on_host = bool(host) or device.type == "cuda"
        if on_host or device.type == "cpu":
            require_room(what, needed, torch.device("cpu"), remedy)
        return on_host

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SampleMemory":
        """What `to`, `cuda`, `half` and the like do to the buffers."""
        if self.on_host:
            return self

        def moved(buffer: Tensor) -> Tensor:
            probe = fn(buffer[:0])
            return fn(buffer) if probe.dtype == buffer.dtype else buffer.to(probe.device)

        return super()._apply(moved, recurse)


def width_remedy(width: int) -> str:
    """Of a method whose memory is as wide as `distiller.width` says."""
    return f"lower distiller.width ({width}), or take fewer images (data.train_subset)"


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On that device; between a GPU and its host through pinned memory."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda":
        # Of rows only: pinned as a whole, a memory would take up to twice its size, and could not be swapped out.
        return tensor.pin_memory().to(device, non_blocking=True)
    if tensor.is_cuda:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor)  # waits for the device
    return tensor.to(device)
