"""One student of benchmarks/accuracy.py: trained from memory, by the package's methods, optimizer and schedule."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import accuracy_data
import torch
from accuracy_data import StudyData
from accuracy_methods import Preset, Task
from torch import Tensor

from kdav_fast.config import ModelConfig, OptimizerConfig, ScheduleConfig, method_section
from kdav_fast.data import Batch
from kdav_fast.distillers import build_distiller
from kdav_fast.distillers.base import Distiller, Progress
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
_worker: dict = {}


def start_worker(file: Path, model: ModelConfig, preset: Preset, device: str, threads: int) -> None:
    """What a process needs before its first `run`."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent ends its workers
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    _worker.update(
        data=accuracy_data.load(file, torch.device(device)), model=model, preset=preset, device=device
    )


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
    network = build_classifier(model.name, data.classes, width=model.width, init=task.init)
    distiller = build_distiller(method_section(task.distiller), data.facts(network)).to(device)
    student = Student(network, distiller.head()).to(device)
    trainee = Trainee(student, {}, distiller, torch.device(device), None, distiller.before_student)
    guard_unsafe_layers(trainee, "channels_last", torch.device(device))
    set_layout(trainee, "channels_last", torch.device(device))
    if preset.compiled:
        network.backbone.compile()
    measure_teacher(distiller, data)
    epoch_steps = len(data.train_labels) // preset.batch_size
    steps = preset.epochs * epoch_steps
    optimizer = build_optimizer(OptimizerConfig(lr=task.lr, weight_decay=preset.weight_decay), trainee)
    factor = lr_factor(ScheduleConfig(name="one_cycle"), steps, epoch_steps)
    clock, curve = _Clock(device), []
    for step, (batch, teacher) in enumerate(batches(data, preset.batch_size, steps, task.seed)):
        for group in optimizer.param_groups:
            group["lr"] = task.lr * factor(step)
        loss = trainee(batch, teacher, Progress(step, steps, step / epoch_steps, preset.epochs)).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            clock.restart()  # the first step compiles
        if (step + 1) * EVALUATIONS // steps > step * EVALUATIONS // steps:
            minutes = clock.minutes
            with clock.stopped():
                accuracy = top1(student, data, data.evaluation_pixels, data.evaluation_labels)
                curve.append(((step + 1) / epoch_steps, minutes, accuracy))
    held_out = top1(student, data, data.held_out_pixels, data.held_out_labels)
    return {
        "top1": accuracy,
        "held_out_top1": held_out,
        "minutes": minutes,
        "curve": curve,
        "loss": loss.item(),
    }


def measure_teacher(distiller: Distiller, data: StudyData) -> None:
    """What the distiller wants to know of the training images before training."""
    every = torch.arange(len(data.train_labels), device=data.train_labels.device)
    for phase in distiller.phases():
        for index in every.split(_MEASURED):
            phase.see(*data.batch(index, torch.zeros_like(index, dtype=torch.bool)))
        phase.finish()


def batches(data: StudyData, size: int, steps: int, seed: int) -> Iterator[tuple[Batch, Outputs]]:
    """Batches of whole ones only, each epoch in another order, each image mirrored by a coin's flip."""
    device, count = data.train_labels.device, len(data.train_labels)
    chance = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(count, generator=chance).to(device)
            mirror = (torch.rand(count, generator=chance) < 0.5).to(device)
        index, order = order[:size], order[size:]
        yield data.batch(index, mirror[index])


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
