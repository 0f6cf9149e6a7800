"""An embedding told from those of other images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.distillers.base import widened

_EPS = 1e-7


def noise_contrast(positive: Tensor, negative: Tensor, weight: Tensor, chance: float) -> Tensor:
    """-log(P_0 / (P_0 + c + eps)) - sum_k log(c / (P_k + c + eps)) of each row, B, eps = 1e-7.

    Args:
        positive: P_0, B.
        negative: P_k, B x M.
        weight: how often each of these counts, B x M.
        chance: c, negatives an image / training images.
    """
    drawn = (weight * torch.log1p((negative + _EPS) / chance)).sum(1)
    # log(1 + (c + eps) / P_0): the quotient alone may be beyond float32.
    return F.softplus(math.log(chance + _EPS) - positive.log(), threshold=40.0) + drawn


def queue_contrast(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of [<q, t>, <q, rows of the queue>] / T with the first, of each row: B.

    Args:
        query: q, B x d, of length 1.
        key: t, the same.
        queue: L x d.
        temperature: T.
    """
    scores = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], dim=1) / temperature
    return scores.logsumexp(1) - scores[:, 0]


def prediction_distance(predicted: Tensor, slow: Tensor) -> Tensor:
    """2 - 2 cos(predicted, slow) of each row of two B x d tensors: B."""
    return 2 - 2 * (F.normalize(predicted, dim=1) * F.normalize(slow, dim=1)).sum(1)


class Embed(nn.Module):
    """z = (W h + b) / |W h + b|."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, width)

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(widened(self.linear(features)), dim=1)
