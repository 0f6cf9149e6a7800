"""Softmax regression representation learning (Yang, Martinez, Bulat, Tzimiropoulos: ICLR 2021)."""

import math
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.config.section import Weight
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Facts, Learned, Progress, mean_over_valid, widened
from kdav_fast.distillers.terms.feature_method import FeatureConfig, FeatureMethod, Terms
from kdav_fast.distillers.terms.maps import require_features, row_mse
from kdav_fast.errors import InputError
from kdav_fast.models.outputs import Outputs

feature_statistics_mse = row_mse
"""Mean over channels of (pool(G) - pool(F_t))^2, of each row of two B x C tensors: B."""


def cross_logits(pooled: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """h(pool(G)), the teacher's classifier (K x C, K) on the student's transformed features, B x C: B x K."""
    return F.linear(pooled, weight.to(pooled.dtype), None if bias is None else bias.to(pooled.dtype))


def connector(narrow: int, wide: int) -> nn.Sequential:
    """G = ReLU(BN(conv1x1(F_s))), to the width of the teacher's features."""
    conv = nn.Conv2d(narrow, wide, 1, bias=False)
    nn.init.normal_(conv.weight, std=math.sqrt(2 / wide))
    return nn.Sequential(conv, nn.BatchNorm2d(wide), nn.ReLU())


class SRRL(FeatureMethod):
    """weight_label * cross-entropy + statistics term + regression term through the teacher's frozen classifier h.

    The statistics term is mean (pool(G) - pool(F_t))^2, the regression term mean (h(pool(G)) - g)^2 with the teacher's
    logits g. pool(F_t) is what the teacher's classifier sees. The published script gives the tensors to the
    constructor of the statistics loss and stops with a TypeError; this is what it means.
    """

    class Config(FeatureConfig):
        """Published for ImageNet, all weights 1; by SimKD's authors for CIFAR-100: connector pooled, weight_kl 1."""

        needs_stages: ClassVar[bool] = True
        weight_statistics: Weight = 1.0
        """Of the pooled features' mean squared difference."""
        weight_regression: Weight = 1.0
        """Of the logits' mean squared difference."""
        connector: Literal["maps", "pooled"] = "maps"
        """What is transformed: the last feature map, which is pooled then, or the pooled features."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        classifier = facts.teacher_classifier
        if classifier is None:
            raise InputError(
                f"the teacher {facts.teacher.name} has no linear classifier on pooled features, through which "
                "distiller.name 'srrl' compares; use distiller.name=kd, or another teacher"
            )
        if config.connector == "pooled":
            require_features("srrl", facts.student)
        # Part of the teacher, not of a run's state.
        self.register_buffer("weight", classifier.weight.detach().clone(), persistent=False)
        bias = None if classifier.bias is None else classifier.bias.detach().clone()
        self.register_buffer("bias", bias, persistent=False)
        width = facts.student.features if config.connector == "pooled" else facts.student.stages[-1][0]
        self.lend("_connector", connector(width, classifier.in_features))

    def learned(self) -> dict[str, Learned]:
        return {"connector": Learned(self._connector)}

    def terms(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Terms:
        pooled = self.config.connector == "pooled"
        given = student.features[:, :, None, None] if pooled else student.stages[-1]
        transformed = widened(learned["connector"](given)).mean((2, 3))
        statistics = feature_statistics_mse(transformed, teacher.features)
        regression = row_mse(cross_logits(transformed, self.weight, self.bias), teacher.logits)
        return {
            "statistics_mse": (self.config.weight_statistics, mean_over_valid(statistics, batch.valid)),
            "regression_mse": (self.config.weight_regression, mean_over_valid(regression, batch.valid)),
        }


METHOD = SRRL
