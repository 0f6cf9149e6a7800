"""Labels only: the plain training that every method is compared with, and that makes a teacher."""

from kdav_fast.distillers.base import Distiller, Losses, Target, label_loss, mean_over_valid
from kdav_fast.models.outputs import Outputs


class LabelsOnly(Distiller):
    """Cross-entropy with the labels."""

    needs_teacher = False

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> Losses:
        loss = mean_over_valid(label_loss(student.logits, target, self.label_smoothing), target.valid)
        return Losses(loss, {"cross_entropy": loss.detach()})
