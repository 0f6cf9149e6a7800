"""A method that adds terms on features to the cross-entropy with the labels and, where wanted, to Hinton's term."""

from abc import abstractmethod
from typing import Self

from pydantic import model_validator
from torch import Tensor, nn

from kdav_fast.config.method import MethodConfig
from kdav_fast.config.section import Temperature, Weight
from kdav_fast.config.training import TrainConfig
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Distiller, Facts, Losses, Progress, label_loss, mean_over_valid
from kdav_fast.distillers.terms.softened import SoftenedConfig, soft_target_kl
from kdav_fast.models.outputs import Outputs

Terms = dict[str, tuple[float, Tensor]]
"""By name: a weight, and a scalar, the mean over valid rows."""


_COMMON = ("weight_label", "weight_kl")


def require_own_terms(section: MethodConfig, *weights: str) -> None:
    """Raise `ValueError` where all these weights are 0: the run would be of another method than it is called."""
    if not any(getattr(section, name) for name in weights):
        names = " and ".join(f"distiller.{name}" for name in weights)
        raise ValueError(
            f"{names} being 0, nothing of distiller.name '{section.name}' is left; raise one, or use distiller.name=kd"
        )


def require_images(section: MethodConfig, train: TrainConfig, least: int, reason: str) -> None:
    """Raise `ValueError` where fewer images than `least` meet in a term: it would be constant."""
    images = train.batch_size // train.accumulate
    if images < least:
        raise ValueError(
            f"train.batch_size / train.accumulate is {images} with distiller.name '{section.name}', {reason}; make it "
            f"{least} or more"
        )


class FeatureConfig(SoftenedConfig):
    """As in the comparisons on CIFAR-100: labels and the method's terms; with weight_kl 1, "+KD"."""

    weight_label: Weight = 1.0
    """Of the cross-entropy with the labels."""
    weight_kl: Weight = 0.0
    """Of T^2 KL between the teacher's and the student's class distributions."""
    temperature: Temperature = 4.0
    """T of the KL term."""

    @model_validator(mode="after")
    def _softened(self) -> Self:
        if self.standardize_logits and self.weight_kl == 0:
            raise ValueError(
                "distiller.standardize_logits is of the KL term, which is off; set distiller.weight_kl above 0, or "
                "leave it false"
            )
        return self

    @model_validator(mode="after")
    def _something_of_its_own(self) -> Self:
        own = [name for name in type(self).model_fields if name.startswith("weight_") and name not in _COMMON]
        require_own_terms(self, *own)
        return self

    @property
    def uses_labels(self) -> bool:
        return self.weight_label > 0


class FeatureMethod(Distiller):
    """weight_label * cross-entropy + weight_kl * T^2 KL + the weighted terms of `terms`."""

    def __init__(self, config: FeatureConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        self.config, self.label_smoothing = config, facts.label_smoothing

    @abstractmethod
    def terms(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Terms:
        """Those on features. Arguments are those of `forward`."""

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        config, terms = self.config, {}
        if config.weight_label > 0:
            hard = label_loss(student.logits, batch, self.label_smoothing)
            terms["cross_entropy"] = config.weight_label, mean_over_valid(hard, batch.valid)
        if config.weight_kl > 0:
            softened = (config.prepared(logits) for logits in (student.logits, teacher.logits))
            kl = soft_target_kl(*softened, config.temperature)
            terms["soft_target_kl"] = config.weight_kl, mean_over_valid(kl, batch.valid)
        terms |= self.terms(student, teacher, batch, learned, progress)
        total = sum(weight * mean for weight, mean in terms.values())
        return Losses(total, {name: mean.detach() for name, (_, mean) in terms.items()})
