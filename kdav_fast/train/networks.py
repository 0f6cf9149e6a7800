"""Student and teacher networks with the weights that a config asks for."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdav_fast.config import Config, MethodConfig, ModelConfig
from kdav_fast.distillers.base import Shapes
from kdav_fast.errors import InputError
from kdav_fast.models import (
    ImageClassifier,
    Normalization,
    build_classifier,
    head_tensors,
    renormalization,
)
from kdav_fast.runtime.memory_format import set_layout
from kdav_fast.runtime.precision import autocast_dtype, check_image_dtype
from kdav_fast.runtime.processes import Cluster
from kdav_fast.student.file import find_student_file, read_stock_weights
from kdav_fast.teachers.frozen import FrozenTeacher
from kdav_fast.train.engine.engine import shard_for_inference
from kdav_fast.train.same_everywhere import require_same_network


def build_network(
    config: ModelConfig, classes: tuple[str, ...], section: str, image_size: int
) -> tuple[ImageClassifier, Normalization | None]:
    """A network with its weights, and the input normalisation these expect, if anything says so."""
    build = partial(
        build_classifier,
        config.name,
        len(classes),
        width=config.width,
        init=config.init,
        image_size=image_size,
        arguments=config.arguments,
    )
    network = build(pretrained=config.pretrained)
    known = _configured(config) or network.normalization
    if config.checkpoint is None:
        if config.reset_head:
            network.load_stock_state_dict(_with_new_head(network.stock_state_dict(), build()))
        return network, known
    weights, card = read_stock_weights(config.checkpoint)
    file = f"{section}.checkpoint {find_student_file(config.checkpoint)}"
    remedy = (
        "set model.reset_head=true to start from them with a new head"
        if section == "model"
        else ("train a teacher for these: 'kdav train' with model.checkpoint and model.reset_head")
    )
    if config.reset_head:
        weights = _with_new_head(weights, network)
    else:
        differing = network.fitted(weights)[1].keys()
        if differing and differing <= _head_tensors(network):
            raise InputError(
                f"{file} holds weights of {config.name} for another number of classes than the data's {len(classes)}; "
                f"{remedy}"
            )
    try:
        network.load_stock_state_dict(weights)
    except InputError as error:
        there = f"; they were trained with the arguments {card.arguments}" if card and card.arguments else ""
        raise InputError(f"{file}: {error}{there}") from None
    if card is not None:
        if card.classes != classes and not config.reset_head:
            first = next(
                (f"{a!r} there, {b!r} here" for a, b in zip(card.classes, classes, strict=False) if a != b),
                f"{len(card.classes)} there, {len(classes)} here",
            )
            raise InputError(
                f"{file} was trained for other classes than the data's ({first}); use weights trained for the same "
                f"class folders, or {remedy}"
            )
        known = _configured(config) or card.normalization
    return network, known


def _with_new_head(weights: dict[str, Tensor], fresh: ImageClassifier) -> dict[str, Tensor]:
    """`weights` with the head of a network that has none yet."""
    head, own = _head_tensors(fresh), fresh.stock_state_dict()
    return {name: tensor for name, tensor in weights.items() if name not in head} | {
        name: own[name] for name in head
    }


def _head_tensors(network: ImageClassifier) -> frozenset[str]:
    return head_tensors(network.name, width=network.width, arguments=network.facts.arguments)


def take_stages(network: ImageClassifier, method: MethodConfig) -> ImageClassifier:
    """Have a network answer with the feature maps that a method asks for; `InputError` if it has none."""
    if method.needs_stages or method.needs_preactivations:
        network.take_stages(preactivations=method.needs_preactivations)
    return network


def shapes_of(network: ImageClassifier, method: MethodConfig, image_size: int) -> Shapes:
    """What a method may know of a network before training."""
    stages = ()
    if method.needs_stages or method.needs_preactivations:
        stages = network.stage_shapes(image_size)
    return Shapes(network.name, network.feature_width, stages)


class BuiltTeacher(NamedTuple):
    """A teacher, and what is known of it with its weights whole, however it is sharded."""

    teacher: FrozenTeacher
    shapes: Shapes
    classifier: nn.Linear | None
    """Its last layer, if it has one."""
    checksum: str
    """Of its weights."""


def build_teacher(
    config: Config,
    classes: tuple[str, ...],
    normalization: Normalization,
    cluster: Cluster,
    dtype: torch.dtype | None,
) -> BuiltTeacher:
    """The teacher that a config names.

    Raises:
        InputError: it has no weights, or those of other classes; or anything of `build_network`.
    """
    if config.teacher.checkpoint is None and not config.teacher.pretrained:
        raise InputError(
            "the teacher has no weights; set teacher.checkpoint to a file or run, or teacher.pretrained=true"
        )
    cluster.say(f"building the teacher {config.teacher.name}")
    network, known = build_network(config.teacher, classes, "teacher", config.data.image_size)
    knows = network.facts.pretrained_classes
    if knows not in (None, len(classes)):
        raise InputError(
            f"teacher.pretrained: the weights of {network.name} know {knows} classes, the data have {len(classes)}, so "
            "that its class scores would be random; train it for these first: 'kdav train' with model.pretrained=true, "
            "then teacher.checkpoint"
        )
    classifier = network.linear_classifier()
    shapes = shapes_of(take_stages(network, config.distiller), config.distiller, config.data.image_size)
    if config.teacher.precision != "train":
        dtype = autocast_dtype(config.teacher.precision, cluster.device, "teacher.precision")
        check_image_dtype(config.data.dtype, dtype, "teacher.precision")
    checksum = require_same_network(cluster, network, "teacher", dtype)
    if config.teacher.sharded:
        shard_for_inference(network, cluster)
    else:
        set_layout(network.to(cluster.device), config.data.layout, cluster.device)
    if config.teacher.compile:
        network.compile()
    renormalize = renormalization(normalization, known or normalization)
    return BuiltTeacher(
        FrozenTeacher(network, renormalize, cluster.device, dtype), shapes, classifier, checksum
    )


def _configured(config: ModelConfig) -> Normalization | None:
    return None if config.mean is None else Normalization(config.mean, config.std)
