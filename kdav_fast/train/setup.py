"""From a config to the parts that the loop runs on."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdav_fast.config import Config, ModelConfig
from kdav_fast.data import DataSets, build_loaders, check_images, open_images
from kdav_fast.data.checks.splits import check_splits
from kdav_fast.data.fingerprint import Fingerprint
from kdav_fast.distillers import Distiller, build_distiller
from kdav_fast.errors import InputError
from kdav_fast.models import (
    IMAGENET,
    ImageClassifier,
    Normalization,
    build_classifier,
    head_tensors,
    renormalization,
)
from kdav_fast.runtime.host_memory import keep_freed_memory
from kdav_fast.runtime.memory_format import guard_unsafe_layers, set_layout
from kdav_fast.runtime.precision import autocast_dtype, check_image_dtype, dtype_name, resolve_precision
from kdav_fast.runtime.processes import Cluster
from kdav_fast.student.file import StudentCard, find_student_file, read_stock_weights
from kdav_fast.student.student import Student
from kdav_fast.teachers.first_answers import FirstAnswers
from kdav_fast.teachers.frozen import FrozenTeacher
from kdav_fast.tracking.class_results import ClassTally
from kdav_fast.train.engine import StudentEngine, micro_batch_size, shard_for_inference
from kdav_fast.train.mixing import Mix, build_mix
from kdav_fast.train.optimizer import build_optimizer
from kdav_fast.train.run_data import check_run_data
from kdav_fast.train.same_everywhere import require_same_network, same_images
from kdav_fast.train.schedule import lr_factor
from kdav_fast.train.trial import try_training_step


@dataclass
class Parts:
    """Everything a run is made of."""

    config: Config
    cluster: Cluster
    dtype: torch.dtype | None
    data: Fingerprint
    """Of the images that rank 0 sees."""
    loaders: DataSets
    normalization: Normalization
    student: Student
    teacher: FrozenTeacher | None
    first_answers: FirstAnswers | None
    """Of the teacher, where there is one."""
    distiller: Distiller
    mix: Mix
    engine: StudentEngine
    """Around `student`."""
    average: AveragedModel | None
    """Exponential moving average of `student`, where the config asks for one."""
    steps: int
    """Optimizer steps of the whole run."""
    steps_per_epoch: float
    """Optimizer steps an epoch."""
    lr: Callable[[int], float]
    """Learning rate of the step about to be taken, 0 .. steps - 1."""
    tally: ClassTally = field(default_factory=ClassTally)
    """How the latest evaluation went class by class."""
    skipped_steps: int = 0
    """Steps of the whole run that were not taken, because something was not finite."""

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir

    @property
    def evaluated_student(self) -> Student:
        """Whose accuracy counts: the average where there is one."""
        return self.student if self.average is None else self.average.module

    def evaluable(self) -> AbstractContextManager[None]:
        """Inside, BatchNorm's statistics are those of all ranks: for evaluation. Every rank must enter."""
        # Of a set, each rank would have an order of its own, and sum one's buffers with the other's.
        return self.cluster.averaged_buffers(dict.fromkeys((self.student, self.evaluated_student)))

    @contextmanager
    def savable(self) -> Iterator[None]:
        """`evaluable`, and every rank holds whole weights: for a student's file. Every rank must enter."""
        with self.evaluable(), self.engine.whole_weights():
            yield

    def epoch(self, step: int) -> float:
        """Epochs done after a step, as it is logged."""
        return round(step / self.steps_per_epoch, 4)

    def card(self, step: int) -> StudentCard:
        """What a file of the student's weights says about itself."""
        head = self.student.head
        return StudentCard(
            name=self.config.model.name,
            width=self.config.model.width,
            arguments=self.student.network.facts.arguments,
            classes=self.loaders.classes,
            mean=self.normalization.mean,
            std=self.normalization.std,
            embedding_width=head and head.projector.out_features,
            data=self.config.data,
            distiller=self.config.distiller.name,
            step=step,
            epoch=self.epoch(step),
            steps=self.steps,
            epochs=self.config.train.epochs,
            precision=dtype_name(self.dtype),
        )


def set_up(config: Config, cluster: Cluster) -> Parts:
    """Build a run's parts; nothing is trained yet and no file of the run is touched.

    Raises:
        InputError: anything in the config that does not fit the data, the weights or the hardware.
    """
    train, device = config.train, cluster.device
    per_step = cluster.world * train.accumulate
    if train.batch_size % per_step:
        raise InputError(
            f"train.batch_size is {train.batch_size}; with {cluster.world} processes and train.accumulate="
            f"{train.accumulate} it must be a multiple of {per_step}"
        )
    dtype = autocast_dtype(resolve_precision(train.precision, device, config.data.image_size), device)
    check_image_dtype(config.data.dtype, dtype)
    if getattr(config.distiller, "impl", None) == "triton" and device.type != "cuda":
        raise InputError(
            f"distiller.impl is 'triton' but the device is '{device.type}'; the fused kernels need a GPU: "
            "use distiller.impl=auto"
        )
    torch.backends.cudnn.benchmark = train.cudnn_benchmark
    if train.keep_freed_memory and device.type == "cpu":
        keep_freed_memory()
    cluster.say(
        f"reading {config.data.name} images" + (f" in {config.data.root}" if config.data.root else "")
    )
    images = cluster.on_first(lambda: open_images(config.data, train.seed))
    for split in images:
        if split.remark:
            cluster.say(split.remark)
    for remark in cluster.on_first(lambda: check_splits(images, train.batch_size)):
        cluster.say(remark)
    length = getattr(config.distiller, "memory_length", 0)
    if length > len(images.train):
        cluster.say(
            f"note: distiller.memory_length is {length} with {len(images.train)} training images: it holds an image "
            "as the teacher saw it in several epochs"
        )
    decode = config.data.check == "decode"
    cluster.on_first(lambda: [check_images(split, config.data.max_pixels, decode) for split in images])
    data = same_images(cluster, images)
    cluster.on_first(lambda: check_run_data(config, data))
    classes = images.train.classes

    torch.manual_seed(train.seed)  # the same initial weights on every rank
    cluster.say(
        f"{len(images.train):,} training and {len(images.evaluation):,} evaluation images of {len(classes):,} classes; "
        f"building {config.model.name}"
    )
    network, known = build_network(config.model, classes, "model", config.data.image_size)
    require_same_network(cluster, network, "model", dtype)
    normalization = _configured(config.data) or known or IMAGENET
    micro_batch = micro_batch_size(train, cluster.world)
    loaders = build_loaders(
        config.data,
        images,
        batch_size=micro_batch,
        eval_batch_size=micro_batch,
        device=device,
        rank=cluster.rank,
        world=cluster.world,
        local_world=cluster.local_world,
        seed=train.seed,
        normalization=normalization,
    )
    teacher, teacher_classifier = _build_teacher(config, classes, normalization, cluster, dtype)
    first_answers = None
    if teacher is not None:
        weights = config.teacher.checkpoint or f"the pretrained weights of {config.teacher.name}"
        first_answers = FirstAnswers(teacher, str(weights), cluster)
    distiller = build_distiller(
        config.distiller,
        student_width=network.feature_width,
        teacher_classifier=teacher_classifier,
        classes=len(classes),
        label_smoothing=train.label_smoothing,
        dtype=dtype or torch.float32,
        teacher_width=teacher and teacher.network.feature_width,
    ).to(device)
    student = Student(network, distiller.head).to(device)
    rows = micro_batch * (cluster.world if train.sync_batchnorm else 1)
    try_training_step(student, config.data.image_size, rows)

    guard_unsafe_layers(student, config.data.layout, device)
    average = None
    if train.ema_decay > 0:
        average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(train.ema_decay), use_buffers=True)
        set_layout(average, config.data.layout, device)
    if train.sync_batchnorm:
        from kdav_fast.train.sync_batchnorm import synchronize_batchnorm  # it loads timm

        student = synchronize_batchnorm(student)
    if config.model.compile:
        network.backbone.compile()  # under an embedding head, the network as a whole is never called
    steps_per_epoch = loaders.train.steps_per_epoch / train.accumulate
    steps = max(1, round(train.epochs * steps_per_epoch))
    factor = lr_factor(config.schedule, steps, steps_per_epoch)
    optimizer = build_optimizer(config.optimizer, student)
    cluster.say("starting DeepSpeed")
    engine = StudentEngine(student, optimizer, train, cluster, dtype)
    if train.zero_stage == 0:
        # Only now: DeepSpeed broadcasts weights as bytes, which it cannot do with channels_last strides. The higher
        # stages keep weights as views of one flat buffer, which have no such strides.
        set_layout(student, config.data.layout, device)
    torch.manual_seed(train.seed + cluster.rank)  # mixing differs between ranks
    return Parts(
        config,
        cluster,
        dtype,
        data,
        loaders,
        normalization,
        student,
        teacher,
        first_answers,
        distiller,
        build_mix(train, len(classes)),
        engine,
        average,
        steps,
        steps_per_epoch,
        lr=lambda step: config.optimizer.lr * factor(step),
    )


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


def _build_teacher(
    config: Config,
    classes: tuple[str, ...],
    normalization: Normalization,
    cluster: Cluster,
    dtype: torch.dtype | None,
) -> tuple[FrozenTeacher | None, nn.Linear | None]:
    """The teacher, if there is one, and its last layer with whole weights, however the teacher is sharded."""
    if config.teacher is None or config.distiller.name == "none":
        return None, None
    if config.teacher.checkpoint is None and not config.teacher.pretrained:
        raise InputError(
            "the teacher has no weights; set teacher.checkpoint to a file or run, or teacher.pretrained=true"
        )
    cluster.say(f"building the teacher {config.teacher.name}")
    network, known = build_network(config.teacher, classes, "teacher", config.data.image_size)
    _check_teacher(network, config.distiller.name, len(classes))
    classifier = network.linear_classifier()
    if config.teacher.precision != "train":
        dtype = autocast_dtype(config.teacher.precision, cluster.device, "teacher.precision")
        check_image_dtype(config.data.dtype, dtype, "teacher.precision")
    require_same_network(cluster, network, "teacher", dtype)
    if config.teacher.sharded:
        shard_for_inference(network, cluster)
    else:
        set_layout(network.to(cluster.device), config.data.layout, cluster.device)
    if config.teacher.compile:
        network.compile()
    renormalize = renormalization(normalization, known or normalization)
    return FrozenTeacher(network, renormalize, cluster.device, dtype), classifier


def _check_teacher(network: ImageClassifier, method: str, classes: int) -> None:
    knows = network.facts.pretrained_classes
    if knows not in (None, classes):
        raise InputError(
            f"teacher.pretrained: the weights of {network.name} know {knows} classes, the data have {classes}, so that "
            "its class scores would be random; train it for these first: 'kdav train' with model.pretrained=true, then "
            "teacher.checkpoint"
        )
    lacks = None
    if method == "simkd" and network.classifier is None:
        lacks = (
            "has no linear classifier on pooled features, which distiller.name 'simkd' gives to the student"
        )
    elif method == "kdav" and not network.feature_width:
        lacks = "has no layer whose input could serve as features, which distiller.name 'kdav' remembers"
    if lacks:
        raise InputError(f"the teacher {network.name} {lacks}; use distiller.name=kd, or another teacher")


def _configured(config: Any) -> Normalization | None:
    return None if config.mean is None else Normalization(config.mean, config.std)
