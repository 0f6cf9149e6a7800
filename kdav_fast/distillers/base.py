"""The interface of every distillation method. The training loop knows only this."""

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.models.outputs import Outputs
from kdav_fast.student.heads import FoldableHead


class Target(NamedTuple):
    """What is known of a batch besides its pixels."""

    labels: Tensor
    """B class ids, int64; of a mixed image, those of the image it started from."""
    valid: Tensor
    """B booleans; False marks padding."""
    mixed: Tensor | None = None
    """B x K class shares, where mixup or CutMix made the images."""

    @property
    def foremost(self) -> Tensor:
        """B class ids: of a mixed image the class of the largest share, else the label."""
        return self.labels if self.mixed is None else self.mixed.argmax(1)


class Losses(NamedTuple):
    """The loss of a batch and its named parts, each a mean over valid rows."""

    total: Tensor
    """Scalar; the only differentiable one."""
    parts: dict[str, Tensor]
    """Detached scalars for the log."""


class Distiller(nn.Module):
    """A method: what it adds to the student, what it measures first, and its loss.

    Its own buffers (a memory, say) are saved with every checkpoint. Parameters that are trained belong to
    `head`, which becomes a part of the student.
    """

    head: FoldableHead | None = None
    """Takes the place of the student's classifier."""
    needs_teacher: bool = True

    @property
    def needs_measuring(self) -> bool:
        """Whether `measure` wants one pass over the training images before training."""
        return False

    def measure(self, teacher: Outputs, target: Target) -> None:
        """See one batch of that pass; rows that are not valid must not count."""

    def finish_measuring(self) -> None:
        """The pass is over on this rank and its sums have been added up over all ranks."""

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> Losses:
        """The loss of one batch."""


def mean_over_valid(rows: Tensor, valid: Tensor) -> Tensor:
    """Mean of the B values whose row is valid; 0 if none is."""
    return torch.where(valid, rows, 0.0).sum() / valid.sum().clamp(min=1)


def widened(tensor: Tensor) -> Tensor:
    """Half precision to float32; other tensors as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def label_loss(logits: Tensor, target: Target, label_smoothing: float) -> Tensor:
    """Cross-entropy of each row, B, with the labels or, where there are some, the mixed shares."""
    truth = target.labels if target.mixed is None else target.mixed
    return F.cross_entropy(widened(logits), truth, reduction="none", label_smoothing=label_smoothing)
