"""The memory's rows by class: what makes a class's mass a sum over neighbours."""

from typing import NamedTuple

import torch
from torch import Tensor


class ClassOrder(NamedTuple):
    """Rows of a memory of class ids, sorted."""

    rows: Tensor
    """Row numbers by class, and within a class in ascending order; L, int64."""
    starts: Tensor
    """Where each class begins in `rows`, and where the last one ends; K + 1, int64. The rest is not in use."""


def class_order(ids: Tensor, classes: int, filled: int | Tensor | None = None) -> ClassOrder:
    """The order of a memory's class ids, for `kdav_loss(memory_order=...)`; nothing waits for the device.

    Args:
        ids: L class ids (int64); those outside 0 .. `classes` - 1 are left out.
        classes: K.
        filled: how many leading rows are in use; `None` means all.
    """
    if filled is not None:
        ids = torch.where(torch.arange(len(ids), device=ids.device) < filled, ids, classes)
    # The radix sort of 16 bits takes a quarter of the passes of one of 64.
    narrow = torch.int16 if classes < 2**15 else torch.int32
    ids, rows = torch.sort(ids.clamp(-1, classes).to(narrow), stable=True)
    return ClassOrder(
        rows, torch.searchsorted(ids, torch.arange(classes + 1, dtype=narrow, device=ids.device))
    )
