"""Universal self-distillation by customised soft labels (Yang et al.: ICCV 2023)."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from kdav_fast.config.method import MethodConfig
from kdav_fast.config.section import Weight
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import (
    Distiller,
    Facts,
    Learned,
    Losses,
    Progress,
    label_loss,
    mean_over_valid,
    sum_of_parts,
    widened,
)
from kdav_fast.distillers.terms.feature_method import require_own_terms
from kdav_fast.distillers.terms.softened import (
    log_softmax_of_others,
    remarks_on_classes,
    require_several_classes,
)
from kdav_fast.distillers.terms.whole_batch import gather_batch
from kdav_fast.errors import InputError
from kdav_fast.models.outputs import Outputs


def zipf_labels(student: Tensor, weak: Tensor, target: Tensor) -> Tensor:
    """1 / rank of each class by its scores in two answers, 0 at the target, normalised: B x K, without gradient.

    Each answer's scores are divided by what it leaves to the others than the target.

    Args:
        student: B x K scores of the student's last layer.
        weak: B x K of the weak head.
        target: B x K booleans, True at the target.
    """
    score = sum(
        each / (1 - each.where(target, 0.0).sum(1, keepdim=True) + 1e-6)
        for each in (student.detach(), weak.detach())
    )
    ranks = torch.arange(1, score.shape[1] + 1, dtype=score.dtype, device=score.device)
    zipf = torch.zeros_like(score).scatter(1, score.argsort(1, descending=True), 1 / ranks.expand_as(score))
    zipf = zipf.masked_fill(target, 0.0)
    return zipf / zipf.sum(1, keepdim=True)


class USKD(Distiller):
    """Cross-entropy + alpha * target term + beta * non-target term + mu * a weak head's smoothed cross-entropy.

    "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized
    Soft Labels". No teacher. Target term: -w_i log p_y with w_i = p_y^2 + 1 - its mean over the batch, here of all
    processes. Non-target term: cross-entropy among the other classes with Zipf's weights, ranked by what the last
    layer and the weak head say together. That head is linear on the pooled stage before the last, and not exported.
    """

    class Config(MethodConfig):
        """Published for CIFAR-100; for ImageNet: alpha 1, beta 0.1, mu 0.005."""

        needs_teacher: ClassVar[bool] = False
        takes_mixed: ClassVar[bool] = False
        needs_stages: ClassVar[bool] = True
        form: Literal["paper", "code"] = "paper"
        """Ranked by probabilities, or as in the code, by the last layer's log-probabilities and the head's
        probabilities."""
        alpha: Weight = 0.1
        """Of the target term."""
        beta: Weight = 0.1
        """Of the non-target term."""
        mu: Weight = 0.1
        """Of the weak head's cross-entropy with the labels, smoothed by 0.1."""

        @model_validator(mode="after")
        def _something_of_its_own(self) -> Self:
            require_own_terms(self, "alpha", "beta", "mu")
            return self

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        require_several_classes(config.name, facts)
        if len(facts.student.stages) < 2:
            raise InputError(
                f"the model {facts.student.name} has one stage, and distiller.name 'uskd' reads the one before the "
                "last; use another model, or distiller.name=cskd"
            )
        self.config, self.label_smoothing, self.classes = config, facts.label_smoothing, facts.classes
        self.lend("_weak_head", nn.Linear(facts.student.stages[-2][0], facts.classes))

    def remarks(self) -> Sequence[str]:
        return remarks_on_classes(
            self.config.name, self.classes, "the term among the other classes (distiller.beta)"
        )

    def learned(self) -> dict[str, Learned]:
        return {"weak_head": Learned(self._weak_head)}

    def forward(
        self,
        student: Outputs,
        teacher: None,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        config, labels = self.config, batch.labels
        weak = widened(learned["weak_head"](student.stages[-2].mean((2, 3))))
        logits = widened(student.logits)
        log_p, target = logits.log_softmax(1), F.one_hot(labels, logits.shape[1]).bool()
        scores = log_p if config.form == "code" else log_p.exp()
        zipf = zipf_labels(scores, weak.softmax(1), target)
        log_p_target = log_p.where(target, 0.0).sum(1)
        square = log_p_target.detach().exp().square()
        weight = square + 1 - mean_over_valid(*reversed(gather_batch(batch.valid, square)))
        parts = {
            "cross_entropy": (1.0, label_loss(logits, batch, self.label_smoothing)),
            "target_cross_entropy": (config.alpha, -weight * log_p_target),
            "non_target_cross_entropy": (config.beta, -(zipf * log_softmax_of_others(logits, target)).sum(1)),
            "weak_cross_entropy": (
                config.mu,
                F.cross_entropy(weak, labels, reduction="none", label_smoothing=0.1),
            ),
        }
        return sum_of_parts(parts, batch.valid)


METHOD = USKD
