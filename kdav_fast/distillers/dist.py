"""Distillation from a stronger teacher (Huang, You, Wang, Qian, Xu: NeurIPS 2022)."""

from collections.abc import Sequence
from typing import Self

from pydantic import model_validator
from torch import Tensor, nn

from kdav_fast.config.method import MethodConfig
from kdav_fast.config.section import Temperature, Weight
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import (
    Distiller,
    Facts,
    Losses,
    Progress,
    label_loss,
    mean_over_valid,
    widened,
)
from kdav_fast.distillers.terms.softened import remarks_on_classes
from kdav_fast.distillers.terms.whole_batch import gather_batch
from kdav_fast.models.outputs import Outputs


def inter_class_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - Pearson's correlation of two rows of B x K probabilities, over their classes: B."""
    centred = (each - each.mean(1, keepdim=True) for each in (student, teacher))
    return 1 - _cosine(*centred, axis=1)


def intra_class_distance(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """1 - Pearson's correlation of two columns of B x K probabilities, over the images, mean over classes; 0 of none.

    Args:
        student: B x K; rows of padding are 0.
        teacher: the same.
        valid: B booleans.
    """
    count = valid.sum().clamp(min=1)
    centred = ((each - each.sum(0) / count).masked_fill(~valid[:, None], 0.0) for each in (student, teacher))
    return (1 - _cosine(*centred, axis=0)).mean() * valid.any()


def _cosine(first: Tensor, second: Tensor, axis: int) -> Tensor:
    return (first * second).sum(axis) / (first.norm(dim=axis) * second.norm(dim=axis) + 1e-8)


class DIST(Distiller):
    """weight_label * cross-entropy + T^2 (weight_inter * inter-class + weight_intra * intra-class distance).

    "Knowledge Distillation from A Stronger Teacher": distributions are matched up to scale and shift, each image's over
    the classes and each class's over the images of the batch, here of all processes. The code's outer weight 2 is in
    both weights.
    """

    class Config(MethodConfig):
        """Published for CIFAR-100; for ImageNet: T 1."""

        temperature: Temperature = 4.0
        """T of the probabilities that are compared."""
        weight_label: Weight = 1.0
        """Of the cross-entropy with the labels."""
        weight_inter: Weight = 2.0
        """Of the distance of each image's probabilities."""
        weight_intra: Weight = 2.0
        """Of the distance of each class's probabilities."""

        @property
        def uses_labels(self) -> bool:
            return self.weight_label > 0

        @model_validator(mode="after")
        def _combinations(self) -> Self:
            if self.weight_inter == 0 and self.weight_intra == 0:
                raise ValueError("distiller.weight_inter and distiller.weight_intra are both 0; raise one")
            return self

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.config, self.label_smoothing, self.classes = config, facts.label_smoothing, facts.classes

    def remarks(self) -> Sequence[str]:
        term = "the distance of each image's probabilities (distiller.weight_inter)"
        return remarks_on_classes(self.config.name, self.classes, term)

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        config, square = self.config, self.config.temperature**2
        p, q = ((widened(each.logits) / config.temperature).softmax(1) for each in (student, teacher))
        valid, *everyone = gather_batch(batch.valid, p, q)
        hard = mean_over_valid(label_loss(student.logits, batch, self.label_smoothing), batch.valid)
        inter = square * mean_over_valid(inter_class_distance(p, q), batch.valid)
        intra = square * intra_class_distance(*everyone, valid)
        total = config.weight_label * hard + config.weight_inter * inter + config.weight_intra * intra
        parts = {"cross_entropy": hard, "inter_class": inter, "intra_class": intra}
        return Losses(total, {name: part.detach() for name, part in parts.items()})


METHOD = DIST
