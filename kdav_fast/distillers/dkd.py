"""Decoupled knowledge distillation (Zhao, Cui, Song, Qiu, Liang: CVPR 2022)."""

from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from kdav_fast.config.method import MethodConfig
from kdav_fast.config.section import NonNegative, Positive, Temperature
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Distiller, Facts, Losses, Progress, label_loss, mean_over_valid, widened
from kdav_fast.errors import InputError
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
    others = scaled.masked_fill(target, -torch.inf)
    of_two = torch.stack([scaled.where(target, 0.0).sum(1), others.logsumexp(1)], dim=1)
    return of_two.log_softmax(1), others.log_softmax(1).masked_fill(target, 0.0)


class DKD(Distiller):
    """weight_label * cross-entropy with the labels + w * (alpha * target class KL + beta * non-target classes KL).

    w = min(epoch / warmup_epochs, 1), epochs counted from 1.
    """

    class Config(MethodConfig):
        """Published for CIFAR-100, with beta 2 to 8 by pair; for ImageNet: T 1, beta 0.5 or 2, warm-up 1."""

        takes_mixed: ClassVar[bool] = False
        temperature: Temperature = 4.0
        alpha: NonNegative = 1.0
        """Of the KL between the labelled class and all others together."""
        beta: NonNegative = 8.0
        """Of the KL among the others."""
        weight_label: Positive = 1.0
        """Of the cross-entropy with the labels."""
        warmup_epochs: NonNegative = 20.0
        """In which the KL terms come in, by as much more in each epoch."""

        @model_validator(mode="after")
        def _combinations(self) -> Self:
            if self.alpha == 0 and self.beta == 0:
                raise ValueError("distiller.alpha and distiller.beta are both 0; raise one")
            return self

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        if facts.classes < 2:
            raise InputError(
                "distiller.name 'dkd' tells a class from the others, but the data have one class; use distiller.name=kd"
            )
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
        rows = {"cross_entropy": label_loss(student.logits, batch, self.label_smoothing)}
        rows["target_class_kl"], rows["non_target_class_kl"] = decoupled_kl(
            student.logits, teacher.logits, batch.labels, config.temperature
        )
        means = {name: mean_over_valid(row, batch.valid) for name, row in rows.items()}
        hard, target, others = means.values()
        epoch = int(progress.epoch) + 1
        weight = min(epoch / config.warmup_epochs, 1.0) if config.warmup_epochs else 1.0
        total = config.weight_label * hard + weight * (config.alpha * target + config.beta * others)
        return Losses(total, {name: mean.detach() for name, mean in means.items()})


METHOD = DKD
