"""The memory's rows by class: what makes a class's mass a sum over neighbours."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from kdav_fast.kernels.sorted_order import sorted_order


class ClassOrder(NamedTuple):
    """Rows of a memory of class ids, sorted."""

    rows: Tensor
    """Row numbers by class, and within a class in ascending order; L, int64."""
    starts: Tensor
    """Where each class begins in `rows`, and where the last one ends; K + 1, int64. Other places have no meaning."""


def class_order(ids: Tensor, classes: int, filled: int | Tensor | None = None) -> ClassOrder:
    """The order of a memory's class ids, for `kdav_loss(memory_order=...)`; nothing waits for the device.

    Args:
        ids: L class ids (int64); those outside 0 .. `classes` - 1 are left out.
        classes: K.
        filled: how many leading rows are in use; `None` means all.
    """
    length = len(ids)
    if isinstance(filled, int):
        ids, filled = ids[:filled], None
    if ids.is_cuda:  # Triton is not on every system without a GPU
        from kdav_fast.kernels.triton_order import order_on_gpu as sort
    else:
        sort = sorted_order
    rows, starts = sort(ids, classes, filled)
    return ClassOrder(F.pad(rows, (0, length - len(ids))), starts)
