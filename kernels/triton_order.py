"""The memory's rows by class on a GPU: a counting sort in three launches, where torch's sort takes ten."""

import torch
import triton
from torch import Tensor

from kdav_fast.kernels import triton_kernels as kernels
from kdav_fast.kernels.caller import on_device
from kdav_fast.kernels.sorted_order import sorted_order

CHUNK = 256
"""Rows that one program puts in their places."""
MOST_ROWS, MOST_CLASSES = 2**17, 2**14
"""Counts take rows x classes / 64 bytes; beyond these, torch sorts."""


def order_on_gpu(ids: Tensor, classes: int, filled: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows and starts of `class_order`; of whole numbers, so that no order of additions matters."""
    length = len(ids)
    if length > MOST_ROWS or classes > MOST_CLASSES:
        return sorted_order(ids, classes, filled)
    ids, chunks = ids.contiguous(), triton.cdiv(length, CHUNK)
    masked = {"MASKED": filled is not None, "BLOCK": CHUNK}
    counts = torch.empty(classes, chunks, dtype=torch.int32, device=ids.device)
    order = torch.empty_like(ids), ids.new_empty(classes + 1)
    with on_device(ids.device):
        kernels.class_counts_kernel[(chunks,)](
            ids, filled, counts, length, classes, chunks, BINS=triton.next_power_of_2(classes + 1), **masked
        )
        ends = counts.view(-1).cumsum(0, dtype=torch.int32)
        kernels.class_order_kernel[(chunks,)](
            ids, filled, counts, ends, *order, length, classes, chunks, PART=16, num_warps=8, **masked
        )
    return order
