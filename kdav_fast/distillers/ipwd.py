"""Inverse probability weighting distillation (Niu et al.: NeurIPS 2022)."""

import torch
from torch import Tensor, nn

from kdav_fast.config.section import PositiveWeight, Temperature, Weight
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
)
from kdav_fast.distillers.terms.softened import SoftenedConfig, soft_target_kl, standardized
from kdav_fast.distillers.terms.whole_batch import gather_batch
from kdav_fast.errors import InputError
from kdav_fast.models.outputs import Outputs


def inverse_probability(distilled_loss: Tensor, label_head_loss: Tensor) -> Tensor:
    """1 / P(image | machine) = 1 + CE(label head) / CE(distilled head) of each row, B, without gradient.

    Args:
        distilled_loss: B cross-entropies with the labels, T 1, of the head that is distilled.
        label_head_loss: the same of the head that learns from labels alone.
    """
    least = torch.finfo(distilled_loss.dtype).eps  # a loss that rounds to 0 would make its row the only one
    return 1 + label_head_loss.detach() / distilled_loss.detach().clamp(min=least)


class IPWD(Distiller):
    """Both heads' cross-entropies with the labels + weight_kl * mean of w_i T^2 KL_i.

    "Respecting Transfer Gap in Knowledge Distillation", arXiv 2210.12787: images of which the teacher's domain has
    few weigh more, w_i the inverse probability. A second classifier on the student's features learns from the labels
    alone; it is not exported.

    Derived, not checked against the authors: there is no public code, and the weight is taken from a summary of the
    paper, which also says that a normalisation of the logits ahead of the weights helps, but not which. Here both
    heads' logits are standardised: of raw ones, an image of which the student is sure has a weight without bound, and
    training diverges. No gradient passes through the weights.
    """

    class Config(SoftenedConfig):
        """No published settings are known, T 4 and weights of 1 are conventions."""

        temperature: Temperature = 4.0
        """T of the KL."""
        weight_label: Weight = 1.0
        """Of the distilled head's cross-entropy with the labels."""
        weight_label_head: PositiveWeight = 1.0
        """Of that of the second head."""
        weight_kl: PositiveWeight = 1.0
        """Of the weighted T^2 KL(teacher || student)."""
        standardize_weights: bool = True
        """Take the weights of logits whose rows have mean 0 and deviation 1, which bounds them."""
        normalize_weights: bool = False
        """Divide the images' weights by their mean over the batch of all processes."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        if not facts.student.features:
            raise InputError(
                f"the model {facts.student.name} has no layer whose input could serve as features, on which "
                "distiller.name 'ipwd' trains a second classifier; use distiller.name=kd, or another model"
            )
        self.config, self.label_smoothing = config, facts.label_smoothing
        self.lend("_label_head", nn.Linear(facts.student.features, facts.classes))

    def learned(self) -> dict[str, Learned]:
        return {"label_head": Learned(self._label_head)}

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        config = self.config
        heads = student.logits, learned["label_head"](student.features)
        weighed = map(standardized, heads) if config.standardize_weights else heads
        weight = inverse_probability(*(label_loss(logits, batch, 0.0) for logits in weighed))
        if config.normalize_weights:
            valid, weights = gather_batch(batch.valid, weight)
            weight = weight / mean_over_valid(weights, valid).clamp(min=1)
        hard, label_head = (label_loss(logits, batch, self.label_smoothing) for logits in heads)
        softened = (config.prepared(each.logits) for each in (student, teacher))
        parts = {
            "cross_entropy": (config.weight_label, hard),
            "label_head_cross_entropy": (config.weight_label_head, label_head),
            "weighted_kl": (config.weight_kl, weight * soft_target_kl(*softened, config.temperature)),
        }
        return sum_of_parts(parts, batch.valid)


METHOD = IPWD
