"""NORM: distillation via N-to-one representation matching (Liu, Li, Li, Yao: ICLR 2023)."""

from bisect import bisect_right
from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kdav_fast.config.section import Mark, Weight, within
from kdav_fast.data.batch import Batch
from kdav_fast.distillers.base import Facts, Losses, Progress, mean_over_valid, widened
from kdav_fast.distillers.terms.feature_method import FeatureConfig, FeatureMethod, Terms
from kdav_fast.distillers.terms.maps import Pair, one_stage, unlike
from kdav_fast.errors import InputError
from kdav_fast.models.outputs import Outputs
from kdav_fast.student.heads import ManyToOneHead

_SCALE = 2.5
_SHARES = {
    "cifar": ((10 / 240, 20 / 240, 180 / 240, 210 / 240), (0.1, 0.5, 1.0, 0.5, 0.1)),
    "imagenet": ((5 / 100, 15 / 100, 60 / 100, 80 / 100), (0.1, 0.5, 0.9, 0.5, 0.1)),
}
"""Of the feature term's weight: where in the run it changes, and to what."""


def many_to_one(expanded: Tensor, teacher_map: Tensor) -> Tensor:
    """Sum over N copies of the mean (E_n - F_t)^2 of each row, B. Halves are widened.

    The larger map is max-pooled by the integer ratio of the heights.

    Args:
        expanded: E, B x N C x H x W.
        teacher_map: F_t, B x C x H' x W'.
    """
    expanded, teacher_map = widened(expanded), widened(teacher_map)
    ratio = teacher_map.shape[2] // expanded.shape[2], expanded.shape[2] // teacher_map.shape[2]
    teacher_map, expanded = (
        F.max_pool2d(each, times) if times > 1 else each
        for each, times in zip((teacher_map, expanded), ratio, strict=True)
    )
    copies = expanded.unflatten(1, (-1, teacher_map.shape[1]))
    return (copies - teacher_map[:, None]).square().flatten(2).mean(2).sum(1)


def scaled_logits(logits: Tensor) -> Tensor:
    """2.5 (z - mean) / sqrt(variance + 1e-7) of each row z of B x K logits. Halves are widened."""
    return _SCALE * F.layer_norm(widened(logits), logits.shape[1:], eps=1e-7)


def share(schedule: str, progress: Progress) -> float:
    """Of the feature term's weight, in this epoch."""
    bounds, shares = _SHARES[schedule]
    return shares[bisect_right(bounds, int(progress.epoch) / progress.epochs)]


class NORM(FeatureMethod):
    """weight_label * cross-entropy + weight_kl * T^2 KL + s * weight_feature * sum over N copies of (E_n - F_t)^2.

    The student's last map F is expanded to E, N times the teacher's channels, reduced to R, and goes on as F + R. It is
    all affine at inference, and folds into the classifier with no difference. Logits of both networks are normalised
    over the classes and multiplied by 2.5 before cross-entropy and KL; this and s, by which the feature term's weight
    rises and falls in the course of the run, are in the authors' code and not in their description of it.
    """

    class Config(FeatureConfig):
        """Published for CIFAR-100, weight_label of 0.0625 to 0.5.

        For ImageNet: schedule imagenet; ResNet-34 -> 18 weight_label 1, ResNet-50 -> MobileNet 0.125.
        """

        needs_stages: ClassVar[bool] = True
        weight_label: Weight = 0.1
        """Of the cross-entropy with the labels."""
        weight_feature: Weight = 1.0
        """Of the sum over copies."""
        copies: Annotated[int, within(1, 256, "each is as wide as the teacher's last map"), Mark.SIZE] = 8
        """N."""
        schedule: Literal["cifar", "imagenet"] = "cifar"
        """s: 0.1, 0.5, 1, 0.5, 0.1, changing at 10, 20, 180 and 210 of 240 parts of the run; of imagenet 0.1, 0.5,
        0.9, 0.5, 0.1, at 5, 15, 60 and 80 of 100."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        if facts.classes < 3:
            raise InputError(
                f"distiller.name 'norm' normalises each image's logits, of which {facts.classes} classes leave 1 and "
                "-1, whatever they are; use another distiller.name, such as kd"
            )
        pair = one_stage(facts, "norm", -1)
        check_ratio(pair)
        self.lend("_head", ManyToOneHead(pair.student[0], pair.teacher[0], facts.classes, config.copies))

    def head(self) -> ManyToOneHead:
        return self._head

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Losses:
        student = student._replace(logits=scaled_logits(self._head.classify(student.embedding)))
        teacher = teacher._replace(logits=scaled_logits(teacher.logits))
        return super().forward(student, teacher, batch, learned, progress)

    def terms(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        learned: dict[str, nn.Module],
        progress: Progress,
    ) -> Terms:
        rows = many_to_one(student.head_map, teacher.stages[-1])
        weight = share(self.config.schedule, progress) * self.config.weight_feature
        return {"many_to_one": (weight, mean_over_valid(rows, batch.valid))}


def check_ratio(pair: Pair) -> None:
    """Raise `InputError` unless max-pooling by a whole number makes one map as large as the other."""
    (_, height, width), (_, its_height, its_width) = pair
    first, second = sorted([(height, width), (its_height, its_width)])
    ratio = second[0] // first[0]
    if (second[0] // ratio, second[1] // ratio) != first:
        raise unlike("norm", pair, "which pooling by a whole number does not make alike")


METHOD = NORM
