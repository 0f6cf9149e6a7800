"""One optimizer step of the student: what a run repeats, and what a benchmark times phase by phase."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from kdav_fast.data import Batch
from kdav_fast.distillers import Losses, Target
from kdav_fast.models.outputs import Outputs
from kdav_fast.runtime.processes import Cluster
from kdav_fast.train.setup import Parts

PHASES = ("data", "teacher", "student", "loss", "backward", "optimizer")
Phase = Callable[[str], AbstractContextManager[object]]


class MicroBatch(NamedTuple):
    """What is kept of a micro-batch until it is known whether its step is taken."""

    logits: Tensor
    """The student's, detached."""
    losses: Losses
    target: Target
    answers: Outputs | None = None
    """The teacher's."""


def take_step(
    parts: Parts, batches: Iterator[Batch], lr: float, phase: Phase = lambda name: nullcontext()
) -> tuple[bool, list[MicroBatch]]:
    """Train on `train.accumulate` batches.

    Args:
        parts: the run.
        batches: without end.
        lr: learning rate.
        phase: entered around each of PHASES, by name; "data" is the time without a batch.

    Returns:
        Whether the step was taken or, because something was not finite, skipped; and its micro-batches.
    """
    seen = find_gradients(parts, batches, phase)
    with phase("optimizer"):
        taken = parts.engine.step(lr)
    return taken, seen


def find_gradients(
    parts: Parts, batches: Iterator[Batch], phase: Phase = lambda name: nullcontext()
) -> list[MicroBatch]:
    """The part of `take_step` before the optimizer's."""
    accumulate = parts.config.train.accumulate
    seen = []
    for micro in range(accumulate):
        with phase("data"):
            batch = next(batches)
        images, target = parts.mix(batch)
        teacher_outputs = None
        if parts.teacher is not None:
            with phase("teacher"):
                teacher_outputs = parts.teacher(images)
                parts.first_answers.see(images, teacher_outputs, target)
        with phase("student"):
            student_outputs = parts.engine(images)
        with phase("loss"):
            losses = parts.distiller(student_outputs, teacher_outputs, target)
        with phase("backward"):
            share = _share_of_valid(target, parts.cluster)
            parts.engine.backward(losses.total * share, last=micro + 1 == accumulate)
        seen.append(MicroBatch(student_outputs.logits.detach(), losses, target, teacher_outputs))
    return seen


def _share_of_valid(target: Target, cluster: Cluster) -> torch.Tensor | float:
    """Turns the mean over this rank's valid rows into its part of the mean over all ranks' valid rows."""
    if cluster.world == 1:
        return 1.0
    mine = target.valid.sum().float()
    total = cluster.sum(mine.clone())
    return mine * cluster.world / total
