"""Decoupled knowledge distillation (Zhao, Cui, Song, Qiu, Liang: CVPR 2022)."""

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from kdav_fast.config.section import Epochs, PositiveWeight, Temperature, Weight
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Distiller, Facts, Losses, Progress, label_loss, sum_of_parts, widened
from kdav_fast.distillers.terms.softened import (
    SoftenedConfig,
    log_softmax_of_others,
    remarks_on_classes,
    require_several_classes,
)
from kdav_fast.models.outputs import Outputs


def decoupled_kl(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The two parts of T^2 KL(softmax(g/T) || softmax(f/T)) of each row, B and B. Halves are widened.

    First that between (p_y, 1 - p_y), the class y against all others; then that among the K - 1 others alone, for
    which the paper drops the factor 1 - q_y that it has in the KL of all classes.

    Args:
        student_logits: f, B x K.
        teacher_logits: g, B x K.
        labels: y, B class ids.
    """
    target = F.one_hot(labels, student_logits.shape[1]).bool()
    log_p, log_q = (_decoupled(logits, target, temperature) for logits in (student_logits, teacher_logits))
    first, second = (
        temperature**2 * F.kl_div(p, q, reduction="none", log_target=True).sum(1)
        for p, q in zip(log_p, log_q, strict=True)
    )
    return first, second


def _decoupled(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log (p_y, 1 - p_y), B x 2, and the log-softmax over the other classes, B x K with 0 at the target.

    By log-sum-exp, as the sum of the others' probabilities may be smaller than any float.
    """
    scaled = widened(logits) / temperature
    others = scaled.masked_fill(target, -torch.inf).logsumexp(1)
    of_two = torch.stack([scaled.where(target, 0.0).sum(1), others], dim=1)
    return of_two.log_softmax(1), log_softmax_of_others(scaled, target)


class DKD(Distiller):
    """weight_label * cross-entropy with the labels + w * (alpha * target class KL + beta * non-target classes KL).

    w = min(epoch / warmup_epochs, 1), epochs counted from 1.
    """

    class Config(SoftenedConfig):
        """Published for CIFAR-100; for ImageNet: T 1, warm-up 1, beta 0.5 (ResNet-34 to -18) or 2 (to MobileNet).

        Beta for CIFAR-100: 8 (ResNet32x4-8x4, to ShuffleNet, ResNet-50 to MobileNet-V2), 6 (VGG-13, wide ResNets), 2
        (ResNet-56 and -110 to small ones).
        """

        takes_mixed: ClassVar[bool] = False
        temperature: Temperature = 4.0
        """T of both KL terms."""
        alpha: Weight = 1.0
        """Of the KL between the labelled class and all others together."""
        beta: Weight = 8.0
        """Of the KL among the others."""
        weight_label: PositiveWeight = 1.0
        """Of the cross-entropy with the labels."""
        warmup_epochs: Epochs = 20.0
        """In which the KL terms come in, by as much more in each epoch."""

        @model_validator(mode="after")
        def _combinations(self) -> Self:
            if self.alpha == 0 and self.beta == 0:
                raise ValueError("distiller.alpha and distiller.beta are both 0; raise one")
            return self

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        require_several_classes(config.name, facts)
        self.config, self.label_smoothing, self.classes = config, facts.label_smoothing, facts.classes

    def remarks(self) -> Sequence[str]:
        return remarks_on_classes(
            self.config.name, self.classes, "the term among the other classes (distiller.beta)"
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
        softened = (config.prepared(logits) for logits in (student.logits, teacher.logits))
        target, others = decoupled_kl(*softened, batch.labels, config.temperature)
        epoch = int(progress.epoch) + 1
        weight = min(epoch / config.warmup_epochs, 1.0) if config.warmup_epochs else 1.0
        parts = {
            "cross_entropy": (config.weight_label, label_loss(student.logits, batch, self.label_smoothing)),
            "target_class_kl": (weight * config.alpha, target),
            "non_target_class_kl": (weight * config.beta, others),
        }
        return sum_of_parts(parts, batch.valid)


METHOD = DKD
