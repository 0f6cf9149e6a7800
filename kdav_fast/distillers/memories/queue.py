"""The last embeddings of a network, over all ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.distillers.memories.gather import Gathering


class Queue(nn.Module):
    """L rows of length 1, random at first; new ones take the place of the oldest.

    All state is in buffers.

    Args:
        length: L.
        width: of a row.
        dtype: in which rows are kept.
    """

    def __init__(self, length: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.length = length
        # One row more than the queue's: rows of padding are written there, so that a push has fixed shapes.
        self.register_buffer("_rows", F.normalize(torch.randn(length + 1, width), dim=1).to(dtype))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @property
    def rows(self) -> Tensor:
        """L x width, halves widened; a copy, as a push may come before the backward pass."""
        rows = self._rows[: self.length]
        return rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32, copy=True)

    @torch.no_grad()
    def push(self, rows: Tensor, valid: Tensor) -> None:
        """Remember a batch, gathered from all ranks in rank order; of more rows than the queue holds the last.

        Args:
            rows: B x width, of length 1.
            valid: B booleans.
        """
        rows, valid = Gathering(rows.to(self._rows.dtype), valid).rows()
        rank, count = valid.cumsum(0) - 1, valid.sum()
        kept = valid & (rank >= count - self.length)
        self._rows[torch.where(kept, (self.pointer + rank) % self.length, self.length)] = rows
        self._rows[self.length] = 0
        self.pointer.copy_((self.pointer + count) % self.length)
