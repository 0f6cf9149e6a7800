"""Normalised knowledge distillation (Yang et al.: ICCV 2023)."""

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.config.section import Temperature, Weight
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
from kdav_fast.distillers.terms.softened import (
    SoftenedConfig,
    log_softmax_of_others,
    remarks_on_classes,
    require_several_classes,
)
from kdav_fast.models.outputs import Outputs


def target_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """-q_y log p_y at T 1 of each row, B, with the teacher's distribution q and the student's p. Halves are widened."""
    log_p, log_q = (widened(each).log_softmax(1) for each in (student_logits, teacher_logits))
    at = labels[:, None]
    return -(log_q.gather(1, at).exp() * log_p.gather(1, at)).squeeze(1)


def non_target_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """-T^2 sum of o(g)_k log o(f)_k, o the softmax at T over the classes k other than y, of each row: B.

    Args:
        student_logits: f, B x K.
        teacher_logits: g, B x K.
        labels: y, B class ids.
    """
    target = F.one_hot(labels, student_logits.shape[1]).bool()
    log_p, log_q = (
        log_softmax_of_others(widened(logits) / temperature, target)
        for logits in (student_logits, teacher_logits)
    )
    return -(temperature**2) * (log_q.exp() * log_p).sum(1)


class NKD(Distiller):
    """Cross-entropy with the labels + the labelled class's soft cross-entropy + gamma * that among the others.

    "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized
    Soft Labels". Both soft terms are cross-entropies, not divergences; the first is at T 1 whatever T.
    """

    class Config(SoftenedConfig):
        """Published for CIFAR-100; for ImageNet: T 1, gamma 1.5."""

        takes_mixed: ClassVar[bool] = False
        temperature: Temperature = 3.0
        """Of the other classes."""
        gamma: Weight = 3.5
        """Of the cross-entropy among the other classes."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        require_several_classes(config.name, facts)
        self.config, self.label_smoothing, self.classes = config, facts.label_smoothing, facts.classes

    def remarks(self) -> Sequence[str]:
        return remarks_on_classes(
            self.config.name, self.classes, "the term among the other classes (distiller.gamma)"
        )

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        config = self.config
        target = target_cross_entropy(student.logits, teacher.logits, batch.labels)
        softened = (config.prepared(each.logits) for each in (student, teacher))
        others = non_target_cross_entropy(*softened, batch.labels, config.temperature)
        parts = {
            "cross_entropy": (1.0, label_loss(student.logits, batch, self.label_smoothing)),
            "target_cross_entropy": (1.0, target),
            "non_target_cross_entropy": (config.gamma, others),
        }
        return sum_of_parts(parts, batch.valid)


METHOD = NKD
