"""What a step that is not taken leaves as it was, beside weights and the optimizer's state."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdav_fast.distillers.memories.memory import Memory


class _Kept(NamedTuple):
    """Buffers of one dtype, and a copy of them."""

    buffers: list[Tensor]
    copy: Tensor
    """All of them, flat, one after another: they are compared and copied in a few launches, however many there are."""
    views: list[Tensor]
    """Of `copy`, in the buffers' shapes."""


class Untouched:
    """All buffers of some modules, as they are now: BatchNorm's statistics, running sums, what a method remembers.

    The copy takes as much device memory as they do, but for memories, which keep only what they overwrite. Nothing
    waits for the device.

    Args:
        modules: whose; on the device, where they stay.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        parts = list(dict.fromkeys(chain.from_iterable(module.modules() for module in modules)))
        self._memories = [part for part in parts if isinstance(part, Memory)]
        for memory in self._memories:
            memory.keep_overwritten()
        theirs = {id(buffer) for memory in self._memories for buffer in memory.buffers()}
        groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for buffer in chain.from_iterable(part.buffers(recurse=False) for part in parts):
            if id(buffer) not in theirs:
                groups[buffer.dtype].append(buffer)
        self._kept = [_keep(buffers) for buffers in groups.values()]

    @torch.no_grad()
    def settle(self, taken: Tensor) -> None:
        """After a step: bring them back to where they were, unless it was taken.

        Args:
            taken: scalar, boolean, on the device.
        """
        for kept in self._kept:
            now = torch.cat([buffer.reshape(-1) for buffer in kept.buffers])
            torch.where(taken, now, kept.copy, out=kept.copy)
            torch._foreach_copy_(kept.buffers, kept.views)
        for memory in self._memories:
            memory.settle(taken)


def _keep(buffers: list[Tensor]) -> _Kept:
    copy = torch.cat([buffer.reshape(-1) for buffer in buffers])
    parts = copy.split([buffer.numel() for buffer in buffers])
    return _Kept(
        buffers, copy, [part.view(buffer.shape) for part, buffer in zip(parts, buffers, strict=True)]
    )
