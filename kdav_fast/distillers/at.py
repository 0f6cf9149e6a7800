"""Attention transfer (Zagoruyko, Komodakis: ICLR 2017)."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.config.section import Stages, Weight
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Facts, Progress, mean_over_valid, widened
from kdav_fast.distillers.terms.feature_method import FeatureConfig, FeatureMethod, Terms
from kdav_fast.distillers.terms.maps import check_common_height, deepest, row_mse, to_common_height
from kdav_fast.models.outputs import Outputs


def attention(stage: Tensor) -> Tensor:
    """A = v / |v|, v = mean over channels of F^2: B x C x H x W to B x HW. Halves are widened."""
    return F.normalize(widened(stage).square().mean(1).flatten(1), dim=1, eps=1e-12)


def attention_mse(student_stage: Tensor, teacher_stage: Tensor) -> Tensor:
    """Mean over H, W of (A(F_s) - A(F_t))^2 of each row of two maps: B.

    The higher map is average-pooled to a square of the other's height (RepDistiller; the authors want equal sizes).
    """
    student_stage, teacher_stage = to_common_height(student_stage, teacher_stage)
    return row_mse(attention(student_stage), attention(teacher_stage))


class AT(FeatureMethod):
    """weight_label * cross-entropy + weight_feature * sum over stages of the attention maps' mean squared difference.

    The paper (as recalled) halves the weight and takes the norm of the difference, not squared; the authors' code, and
    this, squares and averages, so that the effective weight falls with H and W. On CIFAR the authors attach it to the
    groups of pre-activation networks before the closing BatchNorm and ReLU; here, as in RepDistiller, it is after.
    """

    class Config(FeatureConfig):
        """Published for CIFAR-100 (RepDistiller): three stages, weight 1000; for ImageNet: four stages, weight 1000."""

        needs_stages: ClassVar[bool] = True
        weight_feature: Weight = 1000.0
        """Of the sum over stages."""
        stages: Stages = 3
        """How many of the last feature maps, or as many as both networks have."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        pairs = deepest(facts, config.stages)
        for pair in pairs:
            check_common_height("at", pair)
        self.count = len(pairs)

    def terms(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Terms:
        stages = zip(student.stages[-self.count :], teacher.stages[-self.count :], strict=True)
        rows = sum(attention_mse(*pair) for pair in stages)
        return {"attention_mse": (self.config.weight_feature, mean_over_valid(rows, batch.valid))}


METHOD = AT
