"""Hinton's knowledge distillation."""

from torch import nn

from kdav_fast.config.section import PositiveWeight, Temperature, Weight
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Distiller, Facts, Losses, Progress, label_loss, sum_of_parts
from kdav_fast.distillers.terms.softened import SoftenedConfig, soft_target_kl
from kdav_fast.models.outputs import Outputs


class KD(Distiller):
    """weight_label * cross-entropy with the labels + weight_kl * T^2 KL with the teacher.

    Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network".
    """

    class Config(SoftenedConfig):
        """Published for CIFAR-100; for ImageNet: T 1, both weights 0.5."""

        temperature: Temperature = 4.0
        """T of the KL."""
        weight_label: Weight = 0.1
        """Of the cross-entropy with the labels."""
        weight_kl: PositiveWeight = 0.9
        """Of T^2 KL(teacher || student)."""

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
        softened = (config.prepared(logits) for logits in (student.logits, teacher.logits))
        parts = {
            "cross_entropy": (config.weight_label, label_loss(student.logits, batch, self.label_smoothing)),
            "soft_target_kl": (config.weight_kl, soft_target_kl(*softened, config.temperature)),
        }
        return sum_of_parts(parts, batch.valid)


METHOD = KD
