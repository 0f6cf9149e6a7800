"""Class-wise self-distillation (Yun, Park, Lee, Shin: CVPR 2020)."""

from typing import ClassVar

from torch import nn

from kdav_fast.config.section import PositiveWeight, Temperature
from kdav_fast.data.batch import Batch
from kdav_fast.data.views import ClassPairs
from kdav_fast.distillers.base import Distiller, Facts, Losses, Progress, label_loss, sum_of_parts
from kdav_fast.distillers.terms.softened import SoftenedConfig, soft_target_kl
from kdav_fast.models.outputs import Outputs


class CSKD(Distiller):
    """Cross-entropy with the labels + weight_kl * T^2 KL(answer to another image of the class || answer to this one).

    "Regularizing Class-wise Predictions via Self-knowledge Distillation". No teacher, and no gradient flows into the
    answer to the other image, which is drawn with replacement and may be the same. Both terms are of the first images.

    The authors' code answers the other images in a pass of their own, so that batch normalisation sees each half by
    itself; here both halves are one batch, as all views of an image are.
    """

    order = ClassPairs()

    class Config(SoftenedConfig):
        """Published for CIFAR-100 and TinyImageNet; for fine-grained sets weight_kl 3. None for ImageNet."""

        needs_teacher: ClassVar[bool] = False
        takes_mixed: ClassVar[bool] = False
        temperature: Temperature = 4.0
        """T of both answers."""
        weight_kl: PositiveWeight = 1.0
        """Of T^2 KL between the two answers."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.config, self.label_smoothing = config, facts.label_smoothing

    def forward(
        self,
        student: Outputs,
        teacher: None,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        config = self.config
        first, paired = student.logits.unflatten(0, (batch.views, -1))
        softened = (config.prepared(logits) for logits in (first, paired.detach()))
        parts = {
            "cross_entropy": (1.0, label_loss(first, batch, self.label_smoothing)),
            "paired_kl": (config.weight_kl, soft_target_kl(*softened, config.temperature)),
        }
        return sum_of_parts(parts, batch.valid)


METHOD = CSKD
