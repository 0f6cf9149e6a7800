"""Weighted soft labels (Zhou et al.: ICLR 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.config.section import PositiveWeight, Temperature
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import (
    Distiller,
    Facts,
    Losses,
    Progress,
    label_loss,
    sum_of_parts,
    widened,
)
from kdav_fast.distillers.terms.softened import SoftenedConfig
from kdav_fast.models.outputs import Outputs


def soft_label_weight(student_loss: Tensor, teacher_loss: Tensor) -> Tensor:
    """1 - exp(-CE(student) / (CE(teacher) + 1e-7)) of each row, B, without gradient: near 0 where the label is learnt.

    Args:
        student_loss: B cross-entropies with the labels at T 1.
        teacher_loss: the same of the teacher.
    """
    return -torch.expm1(-student_loss.detach() / (teacher_loss.detach() + 1e-7))


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """-T^2 sum_k softmax(g/T)_k log softmax(f/T)_k of each row, B. Halves are widened."""
    log_p = F.log_softmax(widened(student_logits) / temperature, dim=1)
    q = torch.softmax(widened(teacher_logits) / temperature, dim=1)
    return -(temperature**2) * (q * log_p).sum(1)


class WSLD(Distiller):
    """Cross-entropy with the labels + alpha * mean of w_i times the soft targets' cross-entropy.

    "Rethinking soft labels for knowledge distillation: a bias-variance tradeoff perspective". As in the authors' code
    the soft term is a cross-entropy, T^2 included: its gradient is that of KL, its value is not.
    """

    class Config(SoftenedConfig):
        """Published for CIFAR-100; for ImageNet: T 2, alpha 2.5."""

        temperature: Temperature = 4.0
        """T of the soft labels."""
        alpha: PositiveWeight = 2.25
        """Of the weighted soft labels."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.config, self.label_smoothing = config, facts.label_smoothing

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        config = self.config
        weight = soft_label_weight(*(label_loss(each.logits, batch, 0.0) for each in (student, teacher)))
        softened = (config.prepared(each.logits) for each in (student, teacher))
        parts = {
            "cross_entropy": (1.0, label_loss(student.logits, batch, self.label_smoothing)),
            "soft_cross_entropy": (config.alpha, weight * soft_cross_entropy(*softened, config.temperature)),
        }
        return sum_of_parts(parts, batch.valid)


METHOD = WSLD
