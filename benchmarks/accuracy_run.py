"""One student of benchmarks/accuracy.py: trained from memory, by the package's methods, optimizer and schedule."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import accuracy_data
import numpy as np
import torch
from accuracy_data import StudyData
from accuracy_methods import Preset, Task
from torch import Tensor, nn

from kdav_fast.config import ModelConfig, OptimizerConfig, ScheduleConfig, method_section
from kdav_fast.data import Batch
from kdav_fast.data.order import EpochOrder
from kdav_fast.distillers import build_distiller
from kdav_fast.distillers.base import Progress
from kdav_fast.distillers.phases import Fit, Measure
from kdav_fast.models import build_classifier
from kdav_fast.models.outputs import Outputs
from kdav_fast.runtime.host_memory import keep_freed_memory
from kdav_fast.runtime.memory_format import guard_unsafe_layers, set_layout
from kdav_fast.student.student import Student
from kdav_fast.student.trainee import Trainee
from kdav_fast.train.optimizer import build_optimizer
from kdav_fast.train.schedule import lr_factor

EVALUATIONS = 4
"""In a run, evenly spaced."""
_MEASURED = 1000
"""Images a batch, where the teacher is measured."""
_FIT = 1_000_003
"""Of the seed: another order of images than the student's training has."""
_worker: dict = {}


def start_worker(
    file: Path, model: ModelConfig, preset: Preset, device: str, threads: int, everything: bool = False
) -> None:
    """What a process needs before its first `run`.

    Args:
        file: of `accuracy_data.prepare`.
        model: the student's network.
        preset: how it is trained.
        device: where.
        threads: of this process, on a CPU.
        everything: with the teacher's maps and its answers to turned images, for the methods that want them.
    """
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent ends its workers
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    data = accuracy_data.load(file, torch.device(device), maps=everything, turned=everything)
    _worker.update(data=data, model=model, preset=preset, device=device)


def run(task: Task) -> dict:
    """Train and evaluate one student in this process, for `concurrent.futures`."""
    return train_student(task, **_worker)


def train_student(task: Task, data: StudyData, model: ModelConfig, preset: Preset, device: str) -> dict:
    """One student's accuracy.

    Returns:
        `top1` (percent), the same of held-out images (None if there are none), `minutes` of training without
        compilation and evaluation, and `curve`: triples of epoch, minutes, top-1.
    """
    torch.manual_seed(task.seed)
    method = method_section(task.distiller)
    network = build_classifier(model.name, data.classes, width=model.width, init=task.init)
    wants_maps = method.needs_stages or method.needs_preactivations
    if wants_maps:
        network.take_stages(preactivations=method.needs_preactivations)
    if not (wants_maps and method.needs_teacher):
        data = replace(data, maps=())
    distiller = build_distiller(method, data.facts(network, method)).to(device)
    student = Student(network, distiller.head()).to(device)
    learned = distiller.learned()
    modules = {name: one.module.to(device) for name, one in learned.items()}
    trainee = Trainee(student, modules, distiller, torch.device(device), None, distiller.before_student)
    guard_unsafe_layers(trainee, "channels_last", torch.device(device))
    set_layout(trainee, "channels_last", torch.device(device))
    distiller.meet(student)
    if preset.compiled:
        network.compile_backbone()
    order = EpochOrder(
        data.train_labels.cpu().numpy(),
        preset.batch_size,
        shuffle=True,
        order=distiller.order,
        seed=task.seed,
    )
    for phase in distiller.phases():
        measure(phase, data) if isinstance(phase, Measure) else fit(phase, modules, data, order, task.seed)
    steps = task.epochs * order.batches
    optimizer = build_optimizer(
        OptimizerConfig(lr=task.lr, weight_decay=preset.weight_decay), trainee, learned
    )
    factor = lr_factor(ScheduleConfig(name="one_cycle"), steps, order.batches)
    clock, curve = _Clock(device), []
    for step, (batch, teacher) in enumerate(islice(batches(data, order, task.seed), steps)):
        for group in optimizer.param_groups:
            group["lr"] = task.lr * factor(step) * group["lr_factor"]
        progress = Progress(step, steps, step / order.batches, task.epochs)
        loss = trainee(batch, teacher if method.needs_teacher else None, progress).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        distiller.after_step(student, trainee.learned)
        if step == 0:
            clock.restart()  # the first step compiles
        if (step + 1) * EVALUATIONS // steps > step * EVALUATIONS // steps:
            minutes = clock.minutes
            with clock.stopped():
                accuracy = top1(student, data, data.evaluation_pixels, data.evaluation_labels)
                curve.append(((step + 1) / order.batches, minutes, accuracy))
    held_out = top1(student, data, data.held_out_pixels, data.held_out_labels)
    return {
        "top1": accuracy,
        "held_out_top1": held_out,
        "minutes": minutes,
        "curve": curve,
        "loss": loss.item(),
    }


def measure(phase: Measure, data: StudyData) -> None:
    """What the distiller wants to know of the training images before training."""
    every = torch.arange(len(data.train_labels), device=data.train_labels.device)
    for index in every.split(_MEASURED):
        phase.see(*data.batch(index, torch.zeros_like(index, dtype=torch.bool)))
    phase.finish()


def fit(phase: Fit, modules: dict, data: StudyData, order: EpochOrder, seed: int) -> None:
    """Train what the distiller wants trained before the student: SGD under a cosine, as `Fit` says."""
    trained = nn.ModuleList(modules[name] for name in phase.modules).train()
    optimizer = torch.optim.SGD(
        trained.parameters(), phase.lr, momentum=phase.momentum, weight_decay=phase.weight_decay
    )
    steps = max(1, round(phase.epochs * order.batches))
    for step, (batch, teacher) in enumerate(islice(batches(data, order, seed + _FIT), steps)):
        for group in optimizer.param_groups:
            group["lr"] = phase.lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        phase.loss(teacher, batch, modules).total.backward()
        optimizer.step()


def batches(data: StudyData, order: EpochOrder, seed: int) -> Iterator[tuple[Batch, Outputs]]:
    """Without end: the images of each epoch's order, each view of them mirrored by a coin's flip."""
    device = data.train_labels.device
    for epoch in count():
        chance = np.random.default_rng((seed, epoch))
        for places, images in zip(order.places(epoch), order.images_to_load(epoch), strict=True):
            mirrored = torch.from_numpy(chance.random(len(images)) < 0.5).to(device)
            valid = torch.from_numpy(order.valid(places)).to(device)
            yield data.batch(torch.from_numpy(images).to(device), mirrored, order.order, valid)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # another batch size would be compiled for anew
def top1(student: Student, data: StudyData, pixels: Tensor, labels: Tensor, size: int = 500) -> float | None:
    """Percent of these images of `data` that the student classifies right; None if there are none."""
    if len(labels) == 0:
        return None
    student.eval()
    correct = 0
    for part, truth in zip(pixels.split(size), labels.split(size), strict=True):
        correct += (student(data.normalize(part)).logits.argmax(1) == truth).sum()
    student.train()
    return 100 * int(correct) / len(labels)


class _Clock:
    """Minutes of training. On a CPU, of this process's one thread: what else the machine does is not in them."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self.restart()

    def restart(self) -> None:
        self._since = self._now()

    @property
    def minutes(self) -> float:
        return (self._now() - self._since) / 60

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens inside takes no time."""
        stopped_at = self._now()
        yield
        self._since += self._now() - stopped_at

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()
