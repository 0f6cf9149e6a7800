"""Class distributions compared over a batch: between its images, and between the classes (Jin et al., CVPR 2023)."""

import torch
from torch import Tensor

from kdav_fast.distillers.base import widened


def batch_and_class_level(
    student_logits: Tensor, teacher_logits: Tensor, valid: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """|P P' - Q Q'|^2 / B and |P' P - Q' Q|^2 / K, scalars, of the softmax at T of B x K logits. Halves are widened.

    Args:
        student_logits: B x K.
        teacher_logits: B x K.
        valid: B booleans: the other rows count neither in sums nor in B.
    """
    q, p = (
        (widened(logits) / temperature).softmax(1) * valid[:, None]
        for logits in (student_logits, teacher_logits)
    )
    batch = (p @ p.T - q @ q.T).square().sum() / valid.sum().clamp(min=1)
    return batch, (p.T @ p - q.T @ q).square().sum() / p.shape[1]


def share_up_to_median(values: Tensor, valid: Tensor) -> Tensor:
    """Of the valid ones of n values, how many are up to their median, the mean of the middle two: a scalar."""
    count = valid.sum()
    ordered = values.masked_fill(~valid, torch.inf).sort().values
    middle = torch.stack([(count - 1).clamp(min=0) // 2, (count // 2).clamp(max=len(values) - 1)])
    median = ordered[middle].mean()
    return ((values <= median) & valid).sum().to(values.dtype) / count.clamp(min=1)
