"""Feature maps of two networks side by side."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from kdav_fast.distillers.base import Facts, Shapes, widened
from kdav_fast.errors import InputError

Shape = tuple[int, int, int]
"""C, H, W."""


class Pair(NamedTuple):
    """A stage of both networks."""

    student: Shape
    teacher: Shape


def row_mse(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference within each row of two B x ... tensors: B. Halves are widened."""
    return (widened(one) - widened(other)).square().flatten(1).mean(1)


def deepest(facts: Facts, most: int) -> list[Pair]:
    """The last stages of both networks, shallow to deep: `most` of them, or as many as both have."""
    count = min(most, len(facts.student.stages), len(facts.teacher.stages))
    return [
        Pair(*shapes)
        for shapes in zip(facts.student.stages[-count:], facts.teacher.stages[-count:], strict=True)
    ]


def one_stage(facts: Facts, method: str, stage: int) -> Pair:
    """The stage of both networks that `distiller.stage` names; `InputError` where one has no such."""
    for shapes in (facts.student, facts.teacher):
        count = len(shapes.stages)
        if not -count <= stage < count:
            raise InputError(
                f"distiller.stage is {stage} with distiller.name '{method}', but {shapes.name} has {count} feature "
                f"maps; allowed: {-count} to {count - 1}, -1 being the last"
            )
    return Pair(facts.student.stages[stage], facts.teacher.stages[stage])


def to_common_height(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps, the higher one average-pooled to a square of the other's height. Halves are widened."""
    height = min(student.shape[2], teacher.shape[2])
    return tuple(
        widened(each) if each.shape[2] == height else F.adaptive_avg_pool2d(widened(each), height)
        for each in (student, teacher)
    )


def check_common_height(method: str, pair: Pair) -> None:
    """Raise `InputError` unless `to_common_height` makes two maps alike."""
    height = min(pair.student[1], pair.teacher[1])
    student, teacher = (width if own == height else height for _, own, width in pair)
    if student != teacher:
        raise unlike(method, pair, "which pooling to the smaller height does not make alike")


def require_features(method: str, *networks: Shapes) -> None:
    """Raise `InputError` where a network has no pooled features."""
    for shapes in networks:
        if not shapes.features:
            raise InputError(
                f"{shapes.name} has no layer whose input could serve as features, which distiller.name '{method}' "
                "compares; use distiller.name=kd, or another network"
            )


def unlike(method: str, pair: Pair, reason: str) -> InputError:
    """For the user: maps that the method cannot compare."""
    student, teacher = (" x ".join(map(str, shape)) for shape in pair)
    return InputError(
        f"distiller.name '{method}': the student's feature map is {student} (C x H x W) and the teacher's {teacher}, "
        f"{reason}; choose another data.image_size, another student or teacher, or a method on pooled features, such "
        "as distiller.name=rkd"
    )
