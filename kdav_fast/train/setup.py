"""From a config to the parts that the loop runs on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from kdav_fast.config import Config, DataConfig, MethodConfig
from kdav_fast.data import Loaders, Splits, build_loaders, check_images, open_images
from kdav_fast.data.checks.splits import check_splits
from kdav_fast.data.fingerprint import Fingerprint
from kdav_fast.data.views import Order, Shuffled
from kdav_fast.distillers import build_distiller
from kdav_fast.distillers.base import Facts
from kdav_fast.errors import InputError, lack_of_means
from kdav_fast.models import IMAGENET, Normalization
from kdav_fast.runtime.host_memory import keep_freed_memory
from kdav_fast.runtime.memory_format import guard_unsafe_layers, set_layout
from kdav_fast.runtime.precision import autocast_dtype, check_image_dtype, resolve_precision
from kdav_fast.runtime.processes import Cluster
from kdav_fast.student.student import Student
from kdav_fast.student.trainee import Trainee
from kdav_fast.teachers.first_answers import FirstAnswers
from kdav_fast.train.average import StudentAverage
from kdav_fast.train.engine.engine import micro_batch_size
from kdav_fast.train.folder.data import check_run_data
from kdav_fast.train.mixing import build_mix
from kdav_fast.train.networks import build_network, build_teacher, shapes_of, take_stages
from kdav_fast.train.run import Run
from kdav_fast.train.same_everywhere import require_same_network, same_images
from kdav_fast.train.schedule import lr_factor
from kdav_fast.train.trial import check_learned, try_training_step


class RunData(NamedTuple):
    """What a run is trained and evaluated on, looked at."""

    splits: Splits
    fingerprint: Fingerprint
    """As rank 0 finds them; of all ranks the same."""


@contextmanager
def naming_sizes(method: MethodConfig) -> Iterator[None]:
    """Inside, of too little memory or other means an `InputError` says what to lower, the method's keys too."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if lack := lack_of_means(error, method.sizes()):
            raise lack from error
        raise


def set_up(config: Config, cluster: Cluster) -> Run:
    """Build a run; nothing is trained yet, its engine is not started, and no file of the run is touched.

    Raises:
        InputError: anything in the config that does not fit the data, the weights or the hardware.
    """
    train, device = config.train, cluster.device
    _check_batch_size(config, cluster)
    dtype = autocast_dtype(resolve_precision(train.precision, device, config.data.image_size), device)
    check_image_dtype(config.data.dtype, dtype)
    torch.backends.cudnn.benchmark = train.cudnn_benchmark
    if train.keep_freed_memory and device.type == "cpu":
        keep_freed_memory()
    splits, fingerprint = find_data(config, cluster)
    classes = splits.train.classes

    torch.manual_seed(train.seed)  # the same initial weights on every rank
    cluster.say(
        f"{len(splits.train):,} training and {len(splits.evaluation):,} evaluation images of {len(classes):,} classes; "
        f"building {config.model.name}"
    )
    network, known = build_network(config.model, classes, "model", config.data.image_size)
    require_same_network(cluster, network, "model", dtype)
    normalization = _configured(config.data) or known or IMAGENET
    built = None
    if config.distiller.needs_teacher:
        built = build_teacher(config, classes, normalization, cluster, dtype)
    method = config.distiller
    distiller = build_distiller(
        method,
        Facts(
            student=shapes_of(take_stages(network, method), method, config.data.image_size),
            teacher=built and built.shapes,
            teacher_classifier=built and built.classifier,
            labels=splits.train.labels,
            classes=len(classes),
            label_smoothing=train.label_smoothing,
            seed=train.seed,
            dtype=dtype or torch.float32,
            device=device,
        ),
    ).to(device)
    _check_mixing(config, distiller.order)
    for remark in distiller.remarks():
        cluster.say(remark)
    student = Student(network, distiller.head()).to(device)
    rows = micro_batch_size(train, cluster.world) * (cluster.world if train.sync_batchnorm else 1)
    try_training_step(student, config.data.image_size, rows)
    learned = distiller.learned()
    modules = {name: one.module.to(device) for name, one in learned.items()}
    check_learned(method.name, modules, rows)
    trainee = Trainee(student, modules, distiller, device, dtype, distiller.before_student)

    guard_unsafe_layers(trainee, config.data.layout, device)
    average = None
    if train.ema_decay > 0:
        average = StudentAverage(student, train.ema_decay)
        set_layout(average, config.data.layout, device)
    if train.sync_batchnorm:
        from kdav_fast.train.sync_batchnorm import synchronize_batchnorm  # it loads timm

        synchronize_batchnorm(trainee)
    distiller.meet(student)
    if config.model.compile:
        network.compile_backbone()
    loaders = build_run_loaders(config, splits, cluster, normalization, distiller.order)
    steps_per_epoch = loaders.train.batches_per_epoch / train.accumulate
    steps = max(1, round(train.epochs * steps_per_epoch))
    factor = lr_factor(config.schedule, steps, steps_per_epoch)
    return Run(
        config=config,
        cluster=cluster,
        dtype=dtype,
        data=fingerprint,
        loaders=loaders,
        normalization=normalization,
        teacher=built and built.teacher,
        teacher_checksum=built and built.checksum,
        first_answers=built and FirstAnswers(built.teacher, _source(config), cluster),
        distiller=distiller,
        learned=learned,
        trainee=trainee,
        mix=build_mix(train, len(classes)),
        average=average,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        lr=lambda step: config.optimizer.lr * factor(step),
    )


def find_data(config: Config, cluster: Cluster) -> RunData:
    """Open both splits, look through their files, and compare them between hosts and with the run's folder.

    Raises:
        InputError: they cannot be used, or are others than those that the run was begun with.
    """
    cluster.say(
        f"reading {config.data.name} images" + (f" in {config.data.root}" if config.data.root else "")
    )
    splits = cluster.on_first(lambda: open_images(config.data, config.train.seed))
    for split in splits:
        if split.remark:
            cluster.say(split.remark)
    for remark in cluster.on_first(lambda: check_splits(splits, config.train.batch_size)):
        cluster.say(remark)
    decode = config.data.check == "decode"
    cluster.on_first(lambda: [check_images(split, config.data.max_pixels, decode) for split in splits])
    found = same_images(cluster, splits)
    cluster.on_first(lambda: check_run_data(config, found))
    return RunData(splits, found)


def build_run_loaders(
    config: Config, splits: Splits, cluster: Cluster, normalization: Normalization, order: Order = Shuffled()
) -> Loaders:
    """This rank's loaders; raises `InputError` for a way of loading that cannot be had."""
    size = micro_batch_size(config.train, cluster.world)
    return build_loaders(
        config.data,
        splits,
        batch_size=size,
        eval_batch_size=size,
        device=cluster.device,
        rank=cluster.rank,
        world=cluster.world,
        local_world=cluster.local_world,
        seed=config.train.seed,
        normalization=normalization,
        order=order,
    )


def _check_batch_size(config: Config, cluster: Cluster) -> None:
    train = config.train
    per_step = cluster.world * train.accumulate
    if train.batch_size % per_step:
        raise InputError(
            f"train.batch_size is {train.batch_size}; with {cluster.world} processes and train.accumulate="
            f"{train.accumulate} it must be a multiple of {per_step}"
        )


def _check_mixing(config: Config, order: Order) -> None:
    if (config.train.mixup > 0 or config.train.cutmix > 0) and order.count > 1:
        raise InputError(
            f"train.mixup and train.cutmix do not go with distiller.name '{config.distiller.name}', which sees each "
            f"image in {order.count} views; set them to 0"
        )


def _source(config: Config) -> str:
    """What the teacher's weights are called in messages."""
    return str(config.teacher.checkpoint or f"the pretrained weights of {config.teacher.name}")


def _configured(config: DataConfig) -> Normalization | None:
    return None if config.mean is None else Normalization(config.mean, config.std)
