"""Transformed teacher matching, weighted or not (Zheng, Yang: ICLR 2024)."""

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdav_fast.config.method import MethodConfig
from kdav_fast.config.section import Positive, PositiveWeight, Weight
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
from kdav_fast.models.outputs import Outputs


def transformed_teacher_kl(
    student_logits: Tensor, teacher_logits: Tensor, exponent: float
) -> tuple[Tensor, Tensor]:
    """KL(q || softmax(f)) of each row, and the row's weight U: B and B. Halves are widened.

    With q = softmax(g)^l / U, U = sum_k softmax(g)_k^l: the teacher at the temperature 1/l, the student at 1. U is
    largest where the teacher is least sure.

    Args:
        student_logits: f, B x K.
        teacher_logits: g, B x K.
        exponent: l.
    """
    powered = exponent * widened(teacher_logits).log_softmax(1)
    log_p = widened(student_logits).log_softmax(1)
    kl = F.kl_div(log_p, powered.log_softmax(1), reduction="none", log_target=True).sum(1)
    return kl, powered.logsumexp(1).exp()


class WTTM(Distiller):
    """Cross-entropy with the labels + weight_kl * mean of U_i KL_i with the teacher's power transform; no T^2.

    "Knowledge Distillation Based on Transformed Teacher Matching".
    """

    class Config(MethodConfig):
        """Published for CIFAR-100, VGG-13 to VGG-8; TTM: `weighted` false, exponent 0.1, weight_kl 45."""

        weighted: bool = True
        """Whether each image weighs U_i (WTTM) or 1 (TTM)."""
        exponent: Annotated[Positive, Field(le=1)] = 0.2
        """l: of the teacher's probabilities, 1 / temperature."""
        weight_label: Weight = 1.0
        """Of the cross-entropy with the labels."""
        weight_kl: PositiveWeight = 4.0
        """Of the KL."""

        @property
        def uses_labels(self) -> bool:
            return self.weight_label > 0

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
        kl, weight = transformed_teacher_kl(student.logits, teacher.logits, config.exponent)
        parts = {
            "cross_entropy": (config.weight_label, label_loss(student.logits, batch, self.label_smoothing)),
            "transformed_kl": (config.weight_kl, weight * kl if config.weighted else kl),
        }
        return sum_of_parts(parts, batch.valid)


METHOD = WTTM
