"""What benchmarks/training_step.py measures: trainers at work, each with its own loader.

All begin with the same weights and take their first step on the same batch, whose losses must be equal. What stands
beside the run's engine is in step_variants.py.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

import numpy as np
import reference_train
import step_variants
import torch
from data_pipeline import DALI, DALI_READY
from environment import version
from reference_train import Trainer
from timing import peak_extra_bytes, wait_until_idle
from torch import Tensor

from kdav_fast.config import Config, method_section
from kdav_fast.data import Batch, Splits, build_loaders
from kdav_fast.runtime.late_flag import LateFlag
from kdav_fast.runtime.processes import Cluster
from kdav_fast.tracking.meter import TrainMeter
from kdav_fast.train.run import Run
from kdav_fast.train.setup import set_up
from kdav_fast.train.step import take_step

FAST = {
    "train.precision": "bf16",
    "model.compile": "true",
    "teacher.compile": "true",
}
"""Overrides of the recipe that make "kdav_fast" fast."""
REFERENCES = {
    "reference fp32": {},
    "reference bf16 channels_last": {"precision": "bf16", "channels_last": True},
    "reference bf16 channels_last compiled": {"precision": "bf16", "channels_last": True, "compiled": True},
}
CACHED = "kdav_fast synthetic, the teacher's answers at hand"
PLAIN, SLOW, FULL, CEILING = "reference fp32", "kdav_fast fp32", "kdav_fast", "kdav_fast synthetic"
STUDENT, TEACHER = "student only", "teacher forward"
"""What a step without distillation would consist of; measured with CEILING, on the same batch."""
VARIANTS = {f"{CEILING}, {name}": variant for name, variant in step_variants.VARIANTS.items()}
CONTENDERS = (*REFERENCES, SLOW, FULL, CEILING, CACHED, *VARIANTS)
NEEDS = {SLOW: ("deepspeed", DALI), FULL: ("deepspeed", DALI)}
NEEDS |= dict.fromkeys((CEILING, CACHED, STUDENT), ("deepspeed",))
"""Packages without which a contender cannot be measured."""
LONG_EPOCH = 2**20
"""A DataLoader's workers idle at an epoch's end, which a short one would make look frequent."""
WARM_UP = 3
"""Steps in which networks are compiled, convolutions chosen and memory allocated."""


SETTLING = 4
"""Steps before a round's clock starts, or a few more where batches come in groups."""


def obstacle(name: str, device: str) -> str | None:
    """What stands in the way of measuring a contender on this machine; None if nothing does."""
    absent = [package for package in NEEDS.get(name, ()) if version(package) is None]
    if absent:
        return f"{' and '.join(absent)} not installed"
    if device == "cpu" and name in VARIANTS and VARIANTS[name].only_on_gpu:
        return "only on a GPU"
    return None


class Round(NamedTuple):
    """What one contender did in one turn."""

    steps: int
    seconds: float
    parts: dict[str, float]
    """Seconds in each part of a step, all steps together; empty where they are not told apart."""


class PartClock:
    """Sums up the time in each part of a step: between events on a GPU, where nobody waits for them, else by clock."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = self._mark()
        yield
        self._marks.append((name, begin, self._mark()))

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds by part since the last reading; the device must have done its work."""
        sums: dict[str, float] = {}
        for name, begin, end in self._marks:
            seconds = begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
            sums[name] = sums.get(name, 0.0) + seconds
        self._marks = []
        return sums


class Flags(NamedTuple):
    """What a program sets for its whole process: each contender has its own while it works."""

    cudnn_benchmark: bool
    cudnn_tf32: bool
    matmul_precision: str

    @classmethod
    def read(cls) -> "Flags":
        backend = torch.backends.cudnn
        return cls(backend.benchmark, backend.allow_tf32, torch.get_float32_matmul_precision())

    def apply(self) -> None:
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        torch.backends.cudnn.allow_tf32 = self.cudnn_tf32
        torch.set_float32_matmul_precision(self.matmul_precision)


@dataclass
class Contender:
    """Something that takes steps."""

    name: str
    step: Callable[[], object]
    """One step on the next batch."""
    batches: Iterator[object] | None = None
    """Its loader's, without end."""
    ready: int = 0
    """Most batches that can lie ready, in whole or in part, when a round begins."""
    side_by_side: int = 1
    """Batches made at the same time, which come together: a round takes a whole number of such groups."""
    clock: PartClock | None = None
    flags: Flags | None = None
    start_up_s: float = 0.0
    compiled_graphs: int = 0
    """By its first steps; networks of one kind share what an earlier contender compiled."""
    resident_bytes: int = 0
    """On a GPU: what it holds between steps."""
    step_bytes: int = 0
    """What a step holds at most beyond that."""


class Start(NamedTuple):
    """What all begin with: taken from the plain reference."""

    images: Tensor
    target: Tensor
    network: dict[str, Tensor]
    projector: Tensor
    center: Tensor
    """Of the teacher's embeddings. An untrained teacher's hardly differ from each other but for it."""


class Builder:
    """Builds contenders one by one; those that run on the same networks share them.

    Args:
        config: the recipe.
        fast_config: the recipe with FAST.
        cluster: this process.
    """

    def __init__(self, config: Config, fast_config: Config, cluster: Cluster) -> None:
        self._config, self._fast_config = config, fast_config
        self._cluster, self.device = cluster, cluster.device
        self.losses: dict[str, float] = {}
        """Of the first step on the common batch."""
        self.exact: set[str] = set()
        """Whose was taken in float32."""
        self._flags = Flags.read()
        self._fast_bytes = 0
        # The package's group of one process is there for all, but alone a plain program has none to ask.
        reference_train.gather = lambda rows: rows
        torch._dynamo.config.recompile_limit = 64  # all networks are of one class, which shares the limit
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it would go on uncompiled, in silence

    def build(self, name: str) -> Contender:
        """Raises InputError for what the recipe cannot be run with."""
        print(f"starting {name}", flush=True)
        self._flags.apply()
        begin, held, graphs = time.perf_counter(), self._held(), _graphs()
        contender = self._reference(name) if name in REFERENCES else self._package(name)
        contender.flags = Flags.read()
        for _ in range(WARM_UP):
            contender.step()
        self.synchronize()
        contender.start_up_s = time.perf_counter() - begin
        contender.compiled_graphs = _graphs() - graphs
        own = self._held() - held
        if name in (FULL, CEILING, TEACHER):  # the first of them brought the networks
            own = self._fast_bytes = max(own, self._fast_bytes)
        contender.resident_bytes = own
        contender.step_bytes = peak_extra_bytes(contender.step, self.device)
        if contender.clock:
            contender.clock.read()
        wait_until_idle()
        return contender

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _held(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def _reference(self, name: str) -> Contender:
        trainer, batches = self._plain if name == PLAIN else self._train(name)
        start = self._start
        trainer.student.network.load_stock_state_dict(start.network)
        with torch.no_grad():
            trainer.student.projector[0].weight.copy_(start.projector)
        trainer.center = start.center
        images = start.images.contiguous(memory_format=trainer.format)
        with self._first_step(name, exact="precision" not in REFERENCES[name]):
            self.losses[name] = trainer.step(images, start.target).item()
        workers = trainer.train_loader.num_workers
        # A DataLoader prefetches 2 batches a worker, and every worker makes a batch of its own.
        return Contender(name, lambda: trainer.step(*next(batches)), batches, 2 * workers, workers)

    def _train(self, name: str) -> tuple[Trainer, Iterator[tuple[Tensor, Tensor]]]:
        trainer = Trainer(self._config, **REFERENCES[name])
        images = trainer.train_loader.dataset
        images.samples = images.samples * (LONG_EPOCH // len(images) + 1)
        trainer.train_loader = trainer._build_train_loader()
        return trainer, trainer.training_batches()

    @cached_property
    def _plain(self) -> tuple[Trainer, Iterator[tuple[Tensor, Tensor]]]:
        return self._train(PLAIN)

    @cached_property
    def _start(self) -> Start:
        """The same whenever it is asked for: weights, order and cuts follow from the recipe's seed."""
        self._flags.apply()
        trainer, batches = self._plain
        return _start_of(trainer, *next(batches))

    def _package(self, name: str) -> Contender:
        if name == TEACHER:
            teacher = (
                self._fast_run.teacher if version("deepspeed") else self._set_up(self._fast_config).teacher
            )
            return Contender(name, lambda: teacher(self._batch))
        if name == STUDENT:
            config = self._fast_config.model_copy(update={"distiller": method_section({"name": "none"})})
            return self._stepping(name, self._run(config), repeat(self._batch), 0)
        if name in VARIANTS:
            return self._variant(name)
        if name == CACHED:
            run = self._run(self._fast_config)
            answer = run.teacher(self._batch)
            run.teacher = lambda batch: answer
            return self._stepping(name, run, repeat(self._batch), 0)
        run = self._run(self._config) if name == SLOW else self._fast_run
        self._take_first_step(name, run)
        if name == CEILING:
            return self._stepping(name, run, repeat(self._batch), 0)
        return self._stepping(name, run, chain.from_iterable(repeat(run.loaders.train)), DALI_READY)

    def _variant(self, name: str) -> Contender:
        run = self._set_up(self._fast_config)
        run.trainee.train()
        step = VARIANTS[name].build(run)
        with self._first_step(name, exact=run.dtype is None):
            self.losses[name] = step(self._batch).item()
        return Contender(name, lambda: step(self._batch))

    def _stepping(self, name: str, run: Run, batches: Iterator[Batch], ready: int) -> Contender:
        clock, meter = PartClock(self.device), TrainMeter(self._cluster)
        before: LateFlag | None = None

        def step() -> None:
            nonlocal before
            taken, seen = take_step(run, batches, 0, clock.part)
            # As a run does at every step: it adds to the metrics, and hears what became of the step before.
            for micro in seen:
                answer = micro.answer
                meter.update(answer.logits, micro.batch, answer.total, answer.parts, taken)
            before, heard = LateFlag(taken), before
            if heard is not None and not heard.read():
                raise FloatingPointError(f"{name}: loss or gradient not finite; its steps cannot be compared")

        return Contender(name, step, batches if ready else None, ready, clock=clock)

    @cached_property
    def _fast_run(self) -> Run:
        return self._run(self._fast_config)

    @cached_property
    def _batch(self) -> Batch:
        images, target = self._start.images, self._start.target
        return Batch(images, target, torch.ones_like(target, dtype=torch.bool), target)

    def _set_up(self, config: Config) -> Run:
        """With the weights that all begin with; its engine is not started."""
        run = set_up(config, self._cluster)
        if config.distiller.name != "none":
            run.student.network.load_stock_state_dict(self._start.network)
            with torch.no_grad():
                run.student.head.projector.weight.copy_(self._start.projector)
                run.student.head.center.copy_(self._start.center)
        return run

    def _run(self, config: Config) -> Run:
        run = self._set_up(config)
        run.start_engine()
        run.trainee.train()
        found, evaluation = run.loaders.train.images, run.loaders.evaluation.images
        size = config.train.batch_size
        run.loaders = build_loaders(
            config.data,
            Splits(found.select(np.arange(LONG_EPOCH) % len(found)), evaluation),
            batch_size=size,
            eval_batch_size=size,
            device=self.device,
            rank=0,
            world=1,
            local_world=1,
            seed=config.train.seed,
            normalization=run.normalization,
        )
        return run

    def _take_first_step(self, name: str, run: Run) -> None:
        if name == CEILING and FULL in self.losses:
            self.losses[name] = self.losses[FULL]  # the same networks, which have taken it
            return
        with self._first_step(name, exact=run.dtype is None):
            _, (first,) = take_step(run, islice(repeat(self._batch), 1), 0)
            self.losses[name] = first.answer.total.item()

    @contextmanager
    def _first_step(self, name: str, exact: bool) -> Iterator[None]:
        """Inside, float32 is float32: TF32 would differ by more than what the check allows."""
        flags = Flags.read()
        if exact:
            self.exact.add(name)
            Flags(False, False, "highest").apply()
        yield
        flags.apply()


def _start_of(trainer: Trainer, images: Tensor, target: Tensor) -> Start:
    network = {name: value.clone() for name, value in trainer.student.network.stock_state_dict().items()}
    center = trainer.teach(images)[0].mean(0)
    images = images.contiguous(memory_format=torch.channels_last)
    return Start(images, target, network, trainer.student.projector[0].weight.detach().clone(), center)


def _graphs() -> int:
    """How many graphs torch.compile has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def run_round(contender: Contender, seconds: float, builder: Builder) -> Round:
    """One turn of about `seconds`, after which the loader stands still."""
    group = contender.side_by_side
    settling = -(-SETTLING // group) * group if contender.batches is not None else 1
    contender.flags.apply()
    for _ in islice(contender.batches or (), contender.ready):
        pass
    took = _time_steps(contender, settling, builder)
    if contender.clock:
        contender.clock.read()
    steps = max(1, round(seconds * settling / took / group)) * group
    elapsed = _time_steps(contender, steps, builder)
    parts = contender.clock.read() if contender.clock else {}
    wait_until_idle()
    return Round(steps, elapsed, parts)


def _time_steps(contender: Contender, steps: int, builder: Builder) -> float:
    builder.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        contender.step()
    builder.synchronize()
    return time.perf_counter() - begin
