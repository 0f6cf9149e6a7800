"""Similarity-preserving knowledge distillation (Tung, Mori: ICCV 2019)."""

from typing import ClassVar

from torch import Tensor, nn

from kdav_fast.config.section import Weight
from kdav_fast.config.training import TrainConfig
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Progress, widened
from kdav_fast.distillers.terms.feature_method import FeatureConfig, FeatureMethod, Terms, require_images
from kdav_fast.distillers.terms.unit import unit
from kdav_fast.distillers.terms.whole_batch import gather_batch
from kdav_fast.models.outputs import Outputs


def similarity_mse(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """|G_t - G_s|_F^2 / B^2, G = F F^T with rows of length 1: scalar. Halves are widened.

    Args:
        student: B x ... features; rows of padding are 0.
        teacher: B x ..., of any other shape.
        valid: B booleans; B counts these.
    """
    student, teacher = (
        unit(flat @ flat.T) for flat in (widened(student).flatten(1), widened(teacher).flatten(1))
    )
    return (teacher - student).square().sum() / valid.sum().clamp(min=1) ** 2


class SP(FeatureMethod):
    """weight_label * cross-entropy + weight_feature * mean squared difference of the images' similarities.

    On the last feature maps, which may differ in everything; over the batch of all processes.
    """

    class Config(FeatureConfig):
        """Published for CIFAR-100 (RepDistiller)."""

        needs_stages: ClassVar[bool] = True
        weight_feature: Weight = 3000.0
        """Of the similarities' mean squared difference."""

        def check_run(self, train: TrainConfig) -> None:
            require_images(self, train, 2, "which compares images with each other")

    def terms(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Terms:
        valid, *maps = gather_batch(batch.valid, student.stages[-1], teacher.stages[-1])
        return {"similarity_mse": (self.config.weight_feature, similarity_mse(*maps, valid))}


METHOD = SP
