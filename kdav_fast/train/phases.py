"""What a method does before distillation: its phases, one after another, each resumable."""

import math
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kdav_fast.data import Batch, Loader
from kdav_fast.distillers.phases import Fit, Measure
from kdav_fast.errors import InputError
from kdav_fast.models.outputs import Outputs
from kdav_fast.runtime.progress_bar import ProgressBar
from kdav_fast.train.run import Run
from kdav_fast.train.schedule import due
from kdav_fast.train.step import begin_share_of_valid


@dataclass
class PhasePosition:
    """Where a run stands before distillation: what a checkpoint holds of it besides the run's own state."""

    number: int = 0
    """Of the phase in work, in the order of `phases()`; their count when all are over."""
    step: int = 0
    """Batches of it that have been taken."""
    loader: Loader | None = None
    """In the phase's epoch; None before its first batch."""
    optimizer: torch.optim.Optimizer | None = None
    """Of a `Fit`."""
    sums: tuple[Tensor, ...] = ()
    """Of a `Measure`: this rank's, so far."""
    restored: "Restored | None" = None
    """What a phase that was interrupted goes on with."""

    def begin(self, number: int) -> None:
        """Stand at the beginning of a phase."""
        self.number, self.step = number, 0
        self.loader = self.optimizer = self.restored = None
        self.sums = ()


class Restored(NamedTuple):
    """State of a phase, out of a checkpoint."""

    loader: dict[str, Any]
    momentum: dict[str, Tensor]
    """By number of the optimizer's parameter."""


class AfterBatch(Protocol):
    """What the loop does after each batch of a phase."""

    def __call__(self, position: PhasePosition, save_due: bool, values: dict[str, float]) -> bool:
        """Returns whether the run is to stop, its state saved; `values` are for the log."""
        ...


def run_phases(run: Run, position: PhasePosition, after_batch: AfterBatch) -> bool:
    """Go through the phases from `position` on, which moves with them.

    Returns:
        Whether all are over; False if the run is to stop.
    """
    phases = tuple(run.distiller.phases())
    while position.number < len(phases):
        phase = phases[position.number]
        go_through = _measure if isinstance(phase, Measure) else _fit
        if not go_through(run, phase, position, after_batch):
            return False
        position.begin(position.number + 1)
    if phases and run.first_answers is not None:
        run.first_answers.tell()
    return True


@torch.no_grad()
def _measure(run: Run, phase: Measure, position: PhasePosition, after_batch: AfterBatch) -> bool:
    position.loader, position.sums = run.loaders.measure(), phase.sums
    _go_on(position)
    total = position.loader.batches_per_epoch
    with _bar(run, phase.name, position.step, total) as bar:
        for batch in position.loader if position.step < total else ():
            phase.see(batch, _ask(run, batch))
            position.step += 1
            bar.update()
            if after_batch(position, _save_due(run, position.step, total), {}):
                return False
    run.cluster.sum_each(phase.sums)
    phase.finish()
    return True


def _fit(run: Run, phase: Fit, position: PhasePosition, after_batch: AfterBatch) -> bool:
    position.loader = run.loaders.training()
    modules = nn.ModuleList(run.trainee.learned[name] for name in phase.modules)
    position.optimizer = torch.optim.SGD(
        modules.parameters(), phase.lr, momentum=phase.momentum, weight_decay=phase.weight_decay
    )
    _go_on(position)
    per_epoch = position.loader.batches_per_epoch
    total = batches_of(run, phase)
    batches = chain.from_iterable(repeat(position.loader))
    modules.train()
    with _bar(run, phase.name, position.step, total) as bar:
        while position.step < total:
            lr = phase.lr * (1 + math.cos(math.pi * position.step / total)) / 2
            loss = _fit_batch(run, phase, next(batches), position.optimizer, lr)
            position.step += 1
            bar.update()
            values = {}
            if position.step % run.config.train.log_every == 0 or position.step == total:
                mean = run.cluster.sum(loss.double()).item() / run.cluster.world
                _tell(run, bar, phase.name, position.step, mean)
                values = {f"before/{phase.name}/loss": mean, f"before/{phase.name}/lr": lr}
            if after_batch(position, _save_due(run, position.step, per_epoch), values):
                return False
    run.trainee.zero_grad()  # the loss may have reached modules that are not trained here
    return True


def _tell(run: Run, bar: ProgressBar, name: str, step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise InputError(
            f"distiller.name '{run.config.distiller.name}': the loss of {name} is {loss} before distillation; look "
            "at the teacher's weights, or use train.precision=fp32 in another run_dir"
        )
    if bar.disable:
        run.cluster.say(f"{name}: batch {step}/{bar.total}  loss {loss:.4g}")
    else:
        bar.show_figures([f"loss {loss:.4g}"])


def _fit_batch(run: Run, phase: Fit, batch: Batch, optimizer: torch.optim.Optimizer, lr: float) -> Tensor:
    """One optimizer step; returns this rank's part of the loss: the mean over ranks is that over all valid rows."""
    teacher = _ask(run, batch)
    with torch.autocast(run.cluster.device.type, enabled=False):
        losses = phase.loss(teacher, batch, run.trainee.learned)
    optimizer.zero_grad()
    loss = losses.total * begin_share_of_valid(batch, run.cluster)()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = lr
        run.cluster.average_each(
            parameter.grad for parameter in group["params"] if parameter.grad is not None
        )
    optimizer.step()
    return loss.detach()


def _ask(run: Run, batch: Batch) -> Outputs | None:
    """The teacher, if there is one."""
    if run.teacher is None:
        return None
    answers = run.teacher(batch)
    run.first_answers.see(batch, answers)
    return answers


def _go_on(position: PhasePosition) -> None:
    """Where a restored phase was interrupted."""
    if position.restored is None:
        return
    position.loader.load_state_dict(position.restored.loader)
    if position.optimizer is not None:
        for number, parameter in enumerate(position.optimizer.param_groups[0]["params"]):
            if str(number) in position.restored.momentum:
                momentum = position.restored.momentum[str(number)]
                position.optimizer.state[parameter]["momentum_buffer"] = momentum.to(parameter.device)


def momentum(position: PhasePosition) -> dict[str, Tensor]:
    """Of the phase's optimizer, by number of the parameter."""
    if position.optimizer is None:
        return {}
    states = [position.optimizer.state[p] for p in position.optimizer.param_groups[0]["params"]]
    found = {str(number): state.get("momentum_buffer") for number, state in enumerate(states)}
    return {number: tensor for number, tensor in found.items() if tensor is not None}


def batches_of(run: Run, phase: Fit) -> int:
    """How many there are of it."""
    return max(1, round(phase.epochs * run.loaders.train.batches_per_epoch))


def _save_due(run: Run, step: int, per_epoch: int) -> bool:
    """As in training."""
    return due(step, run.config.train.save_every * per_epoch)


def _bar(run: Run, name: str, step: int, total: int) -> ProgressBar:
    return ProgressBar(desc=name, total=total, initial=step, disable=None if run.cluster.is_first else True)
