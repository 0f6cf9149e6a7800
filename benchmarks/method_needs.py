"""What a method needs besides the networks, told without a run: what it learns, remembers and does before."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from kdav_fast.config import MethodConfig
from kdav_fast.distillers import build_distiller
from kdav_fast.distillers.base import Distiller, Facts
from kdav_fast.distillers.phases import Measure
from kdav_fast.models import ImageClassifier, build_classifier
from kdav_fast.student.student import Student
from kdav_fast.train.networks import shapes_of


def needs(method: MethodConfig, settings: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Bytes of what a method trains beside the stock student, and of what it remembers; its views and its phases.

    What it remembers of every image lies on the device "meta", which has shapes and no memory.

    Args:
        method: its section.
        settings: networks, sizes, classes, and images of the data set.
        dtype: of the networks.

    Raises:
        InputError: it does not go with these networks.
    """
    size, classes = settings["image_size"], settings["classes"]
    maps = method.needs_stages or method.needs_preactivations, method.needs_preactivations
    student, teacher = (_network(settings[who], classes, size, *maps) for who in ("student", "teacher"))
    facts = Facts(
        student=shapes_of(student, method, size),
        teacher=shapes_of(teacher, method, size) if method.needs_teacher else None,
        teacher_classifier=teacher.linear_classifier() if method.needs_teacher else None,
        labels=np.arange(settings["images"]) % classes,
        classes=classes,
        label_smoothing=0.0,
        seed=0,
        dtype=dtype,
        device=torch.device("meta"),
    )
    distiller = build_distiller(method, facts)
    head = distiller.head()
    distiller.meet(Student(student, head))
    beside = [one.module for one in distiller.learned().values()] + ([] if head is None else [head])
    return {
        "views": distiller.order.count,
        "teacher": method.needs_teacher,
        "before": before(distiller),
        "learned_bytes": sum(map(bytes_of, beside)),
        "remembered_bytes": sum(buffer.nbytes for buffer in distiller.buffers()),
    }


@cache
def _network(name: str, classes: int, size: int, stages: bool, preactivations: bool) -> ImageClassifier:
    """With the feature maps that are asked for."""
    network = build_classifier(name, classes, image_size=size)
    if stages:
        network.take_stages(preactivations=preactivations)
    return network


def before(distiller: Distiller) -> str:
    """How long the teacher works before distillation begins; "" where nothing comes before."""
    said = []
    for phase in distiller.phases():
        said.append("1 pass" if isinstance(phase, Measure) else f"{phase.epochs:g} epochs")
    return ", ".join(said)


def bytes_of(module: nn.Module) -> int:
    """Of its parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
