"""What a run is made of."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kdav_fast.config import Config
from kdav_fast.data import Batch, Loaders
from kdav_fast.data.fingerprint import Fingerprint
from kdav_fast.distillers.base import Distiller, Learned, Progress
from kdav_fast.models import Normalization
from kdav_fast.runtime.memory_format import set_layout
from kdav_fast.runtime.precision import dtype_name
from kdav_fast.runtime.processes import Cluster
from kdav_fast.student.file import StudentCard
from kdav_fast.student.student import Student
from kdav_fast.student.trainee import Trainee
from kdav_fast.teachers.first_answers import FirstAnswers
from kdav_fast.teachers.frozen import FrozenTeacher
from kdav_fast.tracking.class_results import ClassTally
from kdav_fast.train.average import StudentAverage
from kdav_fast.train.engine.engine import Engine, start_engine
from kdav_fast.train.optimizer import build_optimizer


@dataclass
class Run:
    """Everything a run is made of."""

    config: Config
    cluster: Cluster
    dtype: torch.dtype | None
    """Autocast dtype; None for float32."""
    data: Fingerprint
    """Of the images that rank 0 sees."""
    loaders: Loaders
    normalization: Normalization
    teacher: FrozenTeacher | None
    teacher_checksum: str | None
    """Of its weights, whole."""
    first_answers: FirstAnswers | None
    """Of the teacher, where there is one."""
    distiller: Distiller
    learned: dict[str, Learned]
    """What the distiller trains beside the student; the modules are those of `trainee`."""
    trainee: Trainee
    mix: Callable[[Batch], Batch]
    average: StudentAverage | None
    """Exponential moving average of the student, where the config asks for one."""
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
    engine: Engine = field(init=False)
    """Around `trainee`, from `start_engine` on."""

    def start_engine(self) -> None:
        """Hand the trainee over to DeepSpeed, which may shard its weights; what comes before distillation is done.

        Raises:
            InputError: the optimizer or the settings in `train.deepspeed` cannot be used.
        """
        train, device = self.config.train, self.cluster.device
        self.cluster.say("starting DeepSpeed")
        optimizer = build_optimizer(self.config.optimizer, self.trainee, self.learned)
        self.engine = start_engine(
            self.trainee, optimizer, train, self.cluster, self.dtype, beside=[self.distiller]
        )
        if train.zero_stage == 0:
            # Only now: DeepSpeed broadcasts weights as bytes, which it cannot do with channels_last strides. The higher
            # stages keep weights as views of one flat buffer, which have no such strides.
            set_layout(self.trainee, self.config.data.layout, device)
            self.engine.remember_buffers()
        torch.manual_seed(train.seed + self.cluster.rank)  # mixing differs between ranks

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir

    @property
    def student(self) -> Student:
        return self.trainee.student

    @property
    def evaluated_student(self) -> Student:
        """Whose accuracy counts: the average where there is one."""
        return self.student if self.average is None else self.average.module

    def evaluable(self) -> AbstractContextManager[None]:
        """Inside, BatchNorm's statistics are those of all ranks: for evaluation. Every rank must enter."""
        # In one order on all ranks: they would add up the buffers of one module with those of the other.
        return self.cluster.averaged_buffers(dict.fromkeys((self.student, self.evaluated_student)))

    @contextmanager
    def savable(self) -> Iterator[None]:
        """`evaluable`, and every rank holds whole weights: for a student's file. Every rank must enter."""
        with self.evaluable(), self.engine.whole_weights():
            yield

    def epoch(self, step: int) -> float:
        """Epochs done after a step, as it is logged."""
        return round(step / self.steps_per_epoch, 4)

    def progress(self, step: int) -> Progress:
        """For the distiller, at the step about to be taken, 0 .. steps - 1."""
        return Progress(step, self.steps, step / self.steps_per_epoch, self.config.train.epochs)

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
            data=self.config.data,
            distiller=self.config.distiller.name,
            probabilistic=head is None or head.probabilistic,
            step=step,
            epoch=self.epoch(step),
            steps=self.steps,
            epochs=self.config.train.epochs,
            precision=dtype_name(self.dtype),
        )
