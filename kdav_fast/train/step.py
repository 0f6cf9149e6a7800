"""One optimizer step: what a run repeats, and what a benchmark times part by part."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

from torch import Tensor

from kdav_fast.data import Batch
from kdav_fast.distillers.checks import follows_the_student
from kdav_fast.models.outputs import Outputs
from kdav_fast.runtime.processes import Cluster
from kdav_fast.student.trainee import Answer, Clock
from kdav_fast.train.run import Run

PARTS = ("data", "teacher", "student", "loss", "backward", "optimizer")
"""Of a step, by the names that a `Clock` hears; "data" is the time without a batch."""


class MicroBatch(NamedTuple):
    """What is there to look at of a micro-batch of a step."""

    batch: Batch
    answer: Answer
    """The trainee's."""
    teacher: Outputs | None = None


def take_step(
    run: Run, batches: Iterator[Batch], step: int, clock: Clock = lambda part: nullcontext()
) -> tuple[Tensor, list[MicroBatch]]:
    """Train on `train.accumulate` batches. Nothing waits for the device, but as `Engine` says.

    Args:
        run: its engine must have been started.
        batches: without end.
        step: the one to be taken, 0 .. run.steps - 1.
        clock: entered around each of PARTS.

    Returns:
        Whether the step was taken or, because something was not finite, skipped: scalar, boolean, on the device; and
        its micro-batches.
    """
    seen = find_gradients(run, batches, step, clock)
    follow = None
    if follows_the_student(run.distiller):
        follow = partial(run.distiller.after_step, run.student, run.trainee.learned)
    with clock("optimizer"):
        taken = run.engine.step(run.lr(step), follow)
        if run.average is not None:
            with run.engine.whole_weights():
                run.average.update(run.student, taken)
    return taken, seen


def find_gradients(
    run: Run, batches: Iterator[Batch], step: int, clock: Clock = lambda part: nullcontext()
) -> list[MicroBatch]:
    """The part of `take_step` before the optimizer's."""
    accumulate = run.config.train.accumulate
    progress = run.progress(step)
    seen = []
    for micro in range(accumulate):
        with clock("data"):
            batch = next(batches)
        batch = run.mix(batch)
        share = begin_share_of_valid(batch, run.cluster)
        teacher = None
        if run.teacher is not None:
            with clock("teacher"):
                teacher = run.teacher(batch)
                run.first_answers.see(batch, teacher)
        answer = run.engine(batch, teacher, progress, clock)
        with clock("backward"):
            run.engine.backward(answer.total * share(), last=micro + 1 == accumulate)
        seen.append(MicroBatch(batch, answer, teacher))
    return seen


def begin_share_of_valid(batch: Batch, cluster: Cluster) -> Callable[[], Tensor | float]:
    """Ask the other ranks for their share; what is returned gives this rank's.

    That turns the mean over its valid rows into its part of the mean over all ranks' valid rows.
    """
    if cluster.world == 1:
        return lambda: 1.0
    mine = batch.valid.sum().float()
    total = cluster.begin_sum(mine.clone())
    return lambda: mine * cluster.world / total()
