"""Variational information distillation (Ahn, Hu, Damianou, Lawrence, Dai: CVPR 2019)."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.config.section import Stages, Weight
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Facts, Learned, Progress, mean_over_valid, widened
from kdav_fast.distillers.terms.feature_method import FeatureConfig, FeatureMethod, Terms
from kdav_fast.distillers.terms.maps import check_common_height, deepest, to_common_height
from kdav_fast.models.outputs import Outputs

_LEAST_VARIANCE = 1e-5
_FIRST_VARIANCE = 5.0


def gaussian_nll(mean: Tensor, teacher_stage: Tensor, log_scale: Tensor) -> Tensor:
    """Mean over C, H, W of ((mu - F_t)^2 / var + log var) / 2 of each row: B. Halves are widened.

    Args:
        mean: mu, B x C x H x W.
        teacher_stage: F_t, the same.
        log_scale: C, of which var = log(1 + exp(log_scale)) + 1e-5.
    """
    variance = (F.softplus(widened(log_scale)) + _LEAST_VARIANCE)[:, None, None]
    nll = (widened(mean) - widened(teacher_stage)).square() / variance + variance.log()
    return nll.flatten(1).mean(1) / 2


class Predictor(nn.Module):
    """q(F_t | F_s): a mean from three 1x1 convolutions, a variance for each channel, 5 at first."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(narrow, wide, 1, bias=False), nn.ReLU(), nn.Conv2d(wide, wide, 1, bias=False)]
        self.regressor = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(wide, wide, 1, bias=False))
        self.log_scale = nn.Parameter(
            torch.full((wide,), math.log(math.expm1(_FIRST_VARIANCE - _LEAST_VARIANCE)))
        )

    def forward(self, student_stage: Tensor) -> Tensor:
        return self.regressor(student_stage)


class VID(FeatureMethod):
    """weight_label * cross-entropy + weight_feature * sum over stages of -log q(F_t | F_s), constants left out.

    As in RepDistiller; unlike heights are pooled as in `at`.
    """

    class Config(FeatureConfig):
        """Published for CIFAR-100 (RepDistiller): three stages, weight 1."""

        needs_stages: ClassVar[bool] = True
        weight_feature: Weight = 1.0
        """Of the sum over stages."""
        stages: Stages = 3
        """How many of the last feature maps, or as many as both networks have."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        pairs = deepest(facts, config.stages)
        for pair in pairs:
            check_common_height("vid", pair)
        modules = [Predictor(pair.student[0], pair.teacher[0]) for pair in pairs]
        self.lend("_predictors", nn.ModuleList(modules))

    def learned(self) -> dict[str, Learned]:
        return {"vid": Learned(self._predictors)}

    def terms(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Terms:
        count, rows = len(self._predictors), 0.0
        stages = zip(learned["vid"], student.stages[-count:], teacher.stages[-count:], strict=True)
        for predictor, *maps in stages:
            student_stage, teacher_stage = to_common_height(*maps)
            rows = rows + gaussian_nll(predictor(student_stage), teacher_stage, predictor.log_scale)
        return {"variational_nll": (self.config.weight_feature, mean_over_valid(rows, batch.valid))}


METHOD = VID
