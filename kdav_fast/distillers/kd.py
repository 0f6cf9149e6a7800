"""Hinton's knowledge distillation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.config.method import MethodConfig
from kdav_fast.config.section import Fraction, Temperature
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Distiller, Facts, Losses, Progress, label_loss, mean_over_valid, widened
from kdav_fast.models.outputs import Outputs


def soft_target_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(g/T) || softmax(f/T)) of each row, B (Hinton, Vinyals, Dean 2015). Halves are widened."""
    log_p = F.log_softmax(widened(student_logits) / temperature, dim=1)
    q = torch.softmax(widened(teacher_logits) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p, q, reduction="none").sum(1)


class KD(Distiller):
    """(1 - alpha) * cross-entropy with the labels + alpha * T^2 * KL with the teacher."""

    class Config(MethodConfig):
        """Published for CIFAR-100: alpha 0.9, T 4."""

        alpha: Fraction = 0.9
        temperature: Temperature = 4.0

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.alpha, self.temperature = config.alpha, config.temperature
        self.label_smoothing = facts.label_smoothing

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        hard = mean_over_valid(label_loss(student.logits, batch, self.label_smoothing), batch.valid)
        kl = soft_target_kl(student.logits, teacher.logits, self.temperature)
        soft = mean_over_valid(kl, batch.valid)
        total = (1 - self.alpha) * hard + self.alpha * soft
        return Losses(total, {"cross_entropy": hard.detach(), "soft_target_kl": soft.detach()})


METHOD = KD
