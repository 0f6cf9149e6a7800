"""The batch of all ranks, for terms in which rows meet: with it, two processes come to what one comes to."""

import torch
import torch.distributed as dist
from torch import Tensor

from kdav_fast.distillers.memories.gather import Gathering


def gather_batch(valid: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """Which rows of all ranks are valid, in rank order, and each column's rows; those of padding are 0.

    Every rank must give the same number of rows and make the same scalar of them. To this rank's own rows flows a
    gradient N / n times as large, n of all N valid rows being its own: the training loop weighs a rank's loss by
    n / N. Nothing is communicated in the backward pass.

    Args:
        valid: B booleans.
        columns: B x ... each. What a learned module makes of a row is made before, or its weights' gradients would
            count all ranks' rows.
    """
    columns = tuple(column.masked_fill(~valid.view(-1, *[1] * (column.ndim - 1)), 0) for column in columns)
    everyone, *gathered = Gathering(valid, *(column.detach() for column in columns)).rows()
    if everyone is valid:  # alone
        return valid, *columns
    factor = everyone.sum() / valid.sum().clamp(min=1)
    first = dist.get_rank() * len(valid)
    end = first + len(valid)

    def with_gradient(column: Tensor, rows: Tensor) -> Tensor:
        if not column.requires_grad:
            return rows
        own = column.detach() + factor.to(column.dtype) * (column - column.detach())
        return torch.cat([rows[:first], own, rows[end:]])

    return everyone, *map(with_gradient, columns, gathered)
