"""Distilling knowledge via knowledge review (Chen, Liu, Zhao, Jia: CVPR 2021)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.config.section import Epochs, Stages, Weight, Width
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Facts, Learned, Progress, mean_over_valid, widened
from kdav_fast.distillers.terms.feature_method import FeatureConfig, FeatureMethod, Terms
from kdav_fast.distillers.terms.maps import Pair, deepest, require_features, row_mse, unlike
from kdav_fast.models.outputs import Outputs

_LEVELS = (4, 2, 1)


def hierarchical_context(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """HCL of each row of two B x C x H x W maps, B: mean squared differences on levels, weighted. Halves are widened.

    Full size with weight 1; then average-pooled to 4, 2 and 1, those below H, with weights 1/2, 1/4, 1/8 in turn;
    divided by the sum of the weights.
    """
    student_map, teacher_map = widened(student_map), widened(teacher_map)
    rows, weight, weights = row_mse(student_map, teacher_map), 1.0, 1.0
    for side in _LEVELS:
        if side < student_map.shape[2]:
            weight /= 2
            pooled = (F.adaptive_avg_pool2d(each, side) for each in (student_map, teacher_map))
            rows, weights = rows + weight * row_mse(*pooled), weights + weight
    return rows / weights


class AttentionFusion(nn.Module):
    """ABF: a student's stage, mixed with what came from the deeper ones, made the teacher's.

    Args:
        pair: of the stage; both maps are squares.
        mid: channels of what goes on to the shallower stages.
        deepest: nothing comes from deeper ones.
    """

    def __init__(self, pair: Pair, mid: int, deepest: bool) -> None:
        super().__init__()
        (narrow, self.side, _), (wide, self.teacher_side, _) = pair
        self.conv1 = nn.Sequential(nn.Conv2d(narrow, mid, 1, bias=False), nn.BatchNorm2d(mid))
        self.conv2 = nn.Sequential(nn.Conv2d(mid, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide))
        for conv in (self.conv1[0], self.conv2[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        if not deepest:
            self.att_conv = nn.Sequential(nn.Conv2d(2 * mid, 2, 1), nn.Sigmoid())

    def forward(self, stage: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stage in the teacher's shape, and what goes on to the shallower one."""
        x = self.conv1(stage)
        if deeper is not None:
            y = F.interpolate(deeper, self.side, mode="nearest")
            gates = self.att_conv(torch.cat([x, y], dim=1))
            x = x * gates[:, :1] + y * gates[:, 1:]
        if x.shape[-1] != self.teacher_side:
            x = F.interpolate(x, self.teacher_side, mode="nearest")
        return self.conv2(x), x


class Review(nn.Module):
    """The fusions of all stages, from the deepest to the shallowest."""

    def __init__(self, pairs: Sequence[Pair], mid: int) -> None:
        super().__init__()
        last = len(pairs) - 1
        self.abf = nn.ModuleList(AttentionFusion(pair, mid, i == last) for i, pair in enumerate(pairs))

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """The student's stages, shallow to deep, each in the teacher's shape."""
        fused, deeper = [], None
        for fusion, stage in zip(reversed(self.abf), reversed(stages), strict=True):
            one, deeper = fusion(stage, deeper)
            fused.insert(0, one)
        return fused


class ReviewKD(FeatureMethod):
    """weight_label * cross-entropy + w * sum over stages of HCL; w = weight_feature * min(1, epoch / warmup_epochs).

    Stages are the last feature maps and the pooled features, as a map of 1 x 1; epochs are counted from 0. The
    teacher's maps are taken before their last activation.
    """

    class Config(FeatureConfig):
        """Published for CIFAR-100 and ResNet-32x4 -> 8x4; weights of other pairs are 0.6 to 8.

        For ImageNet: stages 4, preactivations both, no warm-up; ResNet-34 -> 18 width 512, weight 1; ResNet-50 ->
        MobileNet width 256, weight 8.
        """

        needs_stages: ClassVar[bool] = True
        needs_preactivations: ClassVar[bool] = True
        weight_feature: Weight = 5.0
        """Of the sum over stages."""
        warmup_epochs: Epochs = 20.0
        """In which the feature term comes in, from 0 in the first epoch."""
        stages: Stages = 3
        """How many of the last feature maps, or as many as both networks have; the pooled features come on top."""
        width: Width = 512
        """Channels between stages, at most: no more than the student's features."""
        preactivations: Literal["teacher", "both"] = "teacher"
        """Whose maps are taken before their last activation."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        require_features("reviewkd", facts.student, facts.teacher)
        pairs = deepest(facts, config.stages)
        for pair in pairs:
            if any(height != width for _, height, width in pair):
                raise unlike("reviewkd", pair, "but its fusion takes squares")
        self.count = len(pairs)
        pairs.append(Pair(*((one.features, 1, 1) for one in (facts.student, facts.teacher))))
        self.lend("_review", Review(pairs, min(config.width, facts.student.features)))

    def learned(self) -> dict[str, Learned]:
        return {"review": Learned(self._review)}

    def terms(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Terms:
        config = self.config
        maps = student.preactivations if config.preactivations == "both" else student.stages
        fused = learned["review"](self._with_pooled(maps, student))
        wanted = self._with_pooled(teacher.preactivations, teacher)
        rows = sum(hierarchical_context(*pair) for pair in zip(fused, wanted, strict=True))
        warm = min(int(progress.epoch) / config.warmup_epochs, 1.0) if config.warmup_epochs else 1.0
        return {"review_hcl": (warm * config.weight_feature, mean_over_valid(rows, batch.valid))}

    def _with_pooled(self, maps: Sequence[Tensor], outputs: Outputs) -> list[Tensor]:
        return [*maps[-self.count :], outputs.features[:, :, None, None]]


METHOD = ReviewKD
