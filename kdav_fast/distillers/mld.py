"""Multi-level logit distillation (Jin, Wang, Lin: CVPR 2023)."""

from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kdav_fast.config.section import Lenient, PositiveWeight, Temperature, Weight
from kdav_fast.data.batch import Batch
from kdav_fast.data.views import Views
from kdav_fast.distillers.base import (
    Distiller,
    Facts,
    Losses,
    Progress,
    label_loss,
    mean_over_valid,
    widened,
)
from kdav_fast.distillers.terms.levels import batch_and_class_level, share_up_to_median
from kdav_fast.distillers.terms.softened import SoftenedConfig, soft_target_kl
from kdav_fast.distillers.terms.whole_batch import gather_batch
from kdav_fast.models.outputs import Outputs


class Levels(NamedTuple):
    """The loss of one view at three levels."""

    instance: Tensor
    """B."""
    batch: Tensor
    """Scalar, of the images' similarities."""
    classes: Tensor
    """Scalar, of the classes'."""


class MLD(Distiller):
    """weight_label * cross-entropies of the views + weight_levels * (instance + batch + class level of each view).

    "Multi-level Logit Distillation". Instance level: T^2 KL; batch and class level: see `batch_and_class_level`; each
    summed over the temperatures. The batch is that of all processes.

    Published with a weakly and a strongly augmented view of each image; here both views are drawn from the
    augmentations of the `data` section (`data.auto_augment` makes both strong). `views` 1 takes the usual single one.

    The authors' code, `form` "code", computes something else. The first view's instance and batch level are multiplied
    by the share of images whose teacher is at most as sure as the median, its class level by that of the classes,
    about 1/2; the second view has no batch and class level, and at T 2 and 6 its instance level is the first one's.
    """

    class Config(SoftenedConfig):
        """Published for CIFAR-100; for ImageNet: T 1, 2, 3, 5, 6, both weights 0.5."""

        form: Literal["paper", "code"] = "paper"
        """The three levels as the paper describes them, or what its code computes."""
        views: Literal[1, 2] = 2
        """Of each image."""
        temperatures: Annotated[tuple[Temperature, ...], Lenient, Field(min_length=1, max_length=32)] = (
            2.0,
            3.0,
            4.0,
            5.0,
            6.0,
        )
        """T of every level, whose terms are summed over them."""
        weight_label: Weight = 0.1
        """Of the cross-entropies with the labels."""
        weight_levels: PositiveWeight = 0.9
        """Of the three levels."""

        @property
        def uses_labels(self) -> bool:
            return self.weight_label > 0

        @property
        def takes_mixed(self) -> bool:
            return self.views == 1

        @model_validator(mode="after")
        def _combinations(self) -> Self:
            if self.form == "code" and self.views == 1:
                raise ValueError(
                    "distiller.form 'code' is of two views; set distiller.views=2, or distiller.form=paper"
                )
            return self

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.config, self.label_smoothing = config, facts.label_smoothing
        if config.views > 1:
            self.order = Views(config.views)

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        views = list(
            zip(*(each.logits.unflatten(0, (batch.views, -1)) for each in (student, teacher)), strict=True)
        )
        labels = [label_loss(logits, batch, self.label_smoothing) for logits, _ in views]
        compute = self._levels_of_code if self.config.form == "code" else self._levels
        levels = compute(views, batch.valid)
        parts = {
            "cross_entropy": mean_over_valid(sum(labels), batch.valid),
            "instance_level": mean_over_valid(levels.instance, batch.valid),
            "batch_level": levels.batch,
            "class_level": levels.classes,
        }
        hard, *soft = parts.values()
        total = self.config.weight_label * hard + self.config.weight_levels * sum(soft)
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def _levels(self, views: list[tuple[Tensor, Tensor]], valid: Tensor) -> Levels:
        instance = sum(
            self._instance(view, temperature) for view in views for temperature in self.config.temperatures
        )
        return Levels(instance, *map(sum, zip(*(self._others(view, valid) for view in views), strict=True)))

    def _levels_of_code(self, views: list[tuple[Tensor, Tensor]], valid: Tensor) -> Levels:
        first, second = views
        everyone, sure = gather_batch(valid, widened(first[1]).softmax(1))
        images = share_up_to_median(sure.amax(1), everyone)
        classes = share_up_to_median(sure.sum(0), torch.ones_like(sure[0], dtype=torch.bool))
        instance = sum(
            images * self._instance(first, temperature)
            + self._instance(first if temperature in (2, 6) else second, temperature)
            for temperature in self.config.temperatures
        )
        batch, of_classes = self._others(first, valid)
        return Levels(instance, images * batch, classes * of_classes)

    def _instance(self, view: tuple[Tensor, Tensor], temperature: float) -> Tensor:
        return soft_target_kl(*map(self.config.prepared, view), temperature)

    def _others(self, view: tuple[Tensor, Tensor], valid: Tensor) -> tuple[Tensor, Tensor]:
        """Batch and class level of all ranks' rows."""
        everyone, student, teacher = gather_batch(valid, *view)
        pairs = (
            batch_and_class_level(student, teacher, everyone, temperature)
            for temperature in self.config.temperatures
        )
        return tuple(map(sum, zip(*pairs, strict=True)))


METHOD = MLD
