"""Rows of all ranks, before they are remembered: every rank then remembers the same."""

import torch
import torch.distributed as dist
from torch import Tensor


class Gathering:
    """Rows of all ranks, in rank order, of several tensors with as many rows: on their way from when it is made.

    They travel side by side as bytes, in one message, while the device works on. Every rank must give the same number
    of rows. Alone, the tensors come back as they are.
    """

    def __init__(self, *columns: Tensor) -> None:
        self._columns = columns
        self._message: tuple[Tensor, dist.Work] | None = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            wire = torch.cat([_as_bytes(column) for column in columns], dim=1)
            arriving = wire.new_empty(dist.get_world_size() * wire.shape[0], wire.shape[1])
            self._message = arriving, dist.all_gather_into_tensor(arriving, wire, async_op=True)

    def rows(self) -> tuple[Tensor, ...]:
        """What has arrived; on a GPU, what is done with it waits, not the host."""
        if self._message is None:
            return self._columns
        arrived, work = self._message
        work.wait()
        parts = arrived.split([_as_bytes(column).shape[1] for column in self._columns], dim=1)
        return tuple(
            part.contiguous().view(column.dtype).view(-1, *column.shape[1:])
            for part, column in zip(parts, self._columns, strict=True)
        )


def _as_bytes(column: Tensor) -> Tensor:
    return column.contiguous().view(len(column), -1).view(torch.uint8)
