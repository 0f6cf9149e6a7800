"""Hinton's knowledge distillation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdav_fast.distillers.base import Distiller, Losses, Target, label_loss, mean_over_valid, widened
from kdav_fast.models.outputs import Outputs


def soft_target_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(g/T) || softmax(f/T)) of each row, B (Hinton, Vinyals, Dean 2015). Halves are widened."""
    log_p = F.log_softmax(widened(student_logits) / temperature, dim=1)
    q = torch.softmax(widened(teacher_logits) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p, q, reduction="none").sum(1)


class KDDistiller(Distiller):
    """(1 - alpha) * cross-entropy with the labels + alpha * T^2 * KL with the teacher."""

    def __init__(self, alpha: float = 0.9, temperature: float = 4.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.alpha, self.temperature, self.label_smoothing = alpha, temperature, label_smoothing

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> Losses:
        hard = mean_over_valid(label_loss(student.logits, target, self.label_smoothing), target.valid)
        kl = soft_target_kl(student.logits, teacher.logits, self.temperature)
        soft = mean_over_valid(kl, target.valid)
        total = (1 - self.alpha) * hard + self.alpha * soft
        return Losses(total, {"cross_entropy": hard.detach(), "soft_target_kl": soft.detach()})
