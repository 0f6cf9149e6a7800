"""Labels only: the plain training that every method is compared with, and that makes a teacher."""

from typing import ClassVar

from torch import nn

from kdav_fast.config.method import MethodConfig
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Distiller, Facts, Losses, Progress, label_loss, mean_over_valid
from kdav_fast.models.outputs import Outputs


class LabelsOnly(Distiller):
    """Cross-entropy with the labels."""

    class Config(MethodConfig):
        """No teacher."""

        needs_teacher: ClassVar[bool] = False

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.label_smoothing = facts.label_smoothing

    def forward(
        self,
        student: Outputs,
        teacher: Outputs | None,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        loss = mean_over_valid(label_loss(student.logits, batch, self.label_smoothing), batch.valid)
        return Losses(loss, {"cross_entropy": loss.detach()})


METHOD = LabelsOnly
