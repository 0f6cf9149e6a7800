"""Directions of rows."""

import torch.nn.functional as F
from torch import Tensor


def unit(rows: Tensor) -> Tensor:
    """Rows of the last axis, scaled to length 1. Those that are 0 stay so and have no gradient.

    `F.normalize` gives these one that is 1e12 times as large as all others.
    """
    zero = (rows == 0).all(-1, keepdim=True)
    return F.normalize(rows.masked_fill(zero, 1.0), dim=-1, eps=1e-12).masked_fill(zero, 0.0)
