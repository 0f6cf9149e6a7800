"""Which steps a run has skipped; when these are so many that it makes no sense to go on, or that it should be told."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from kdav_fast.errors import InputError
from kdav_fast.models.outputs import Outputs
from kdav_fast.runtime.late_flag import LateFlag
from kdav_fast.train.run import Run
from kdav_fast.train.step import MicroBatch


class SkippedSteps:
    """Counts steps in a row whose loss or gradient was not finite.

    Args:
        most: how many are one too many.
    """

    def __init__(self, most: int) -> None:
        self._most, self._in_a_row = most, 0

    def taken(self) -> None:
        """A step was taken."""
        self._in_a_row = 0

    def skipped(self, step: int) -> None:
        """A step was skipped, on all ranks alike.

        Raises:
            InputError: it was one too many in a row.
        """
        self._in_a_row += 1
        if self._in_a_row == self._most:
            raise InputError(
                f"loss or gradient was not finite in {self._most} steps in a row, the last of them step {step}; lower "
                "optimizer.lr, set train.clip_grad_norm, or use train.precision=fp32 or bf16 (the bound is "
                "train.max_skipped_steps); checkpoints hold the state of earlier steps"
            )

    def conclude(self, skipped: int, steps: int) -> str | None:
        """At the end of a run; returns what there is to tell.

        Args:
            skipped: steps of the whole run that were skipped.
            steps: of the whole run.

        Raises:
            InputError: not one step was taken.
        """
        if skipped == steps:
            raise InputError(
                f"loss or gradient was not finite in any of the {steps} steps, so nothing was trained and no student "
                "is written; use train.precision=fp32 or bf16, or a lower optimizer.lr, in another run_dir"
            )
        if skipped > steps / 2 or self._in_a_row > 1:
            last = f", the last {self._in_a_row} in a row among them" if self._in_a_row else ""
            return (
                f"warning: {skipped} of {steps} steps were skipped, as loss or gradient was not finite{last}"
            )
        return None


class _Step(NamedTuple):
    """One whose outcome is not known yet."""

    number: int
    taken: LateFlag
    answers: list[Outputs]
    """The teacher's."""


class Outcomes:
    """Whether steps were taken, heard of one step late: by then the device has been given the next one.

    Args:
        run: counts its skipped steps.
        say: takes a line for the user.
    """

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._pending: _Step | None = None
        self.guard = SkippedSteps(run.config.train.max_skipped_steps)

    def add(self, step: int, taken: Tensor, seen: list[MicroBatch]) -> None:
        """A step was begun; hear of the one before. Every rank must call this.

        Args:
            step: its number, from 1 on.
            taken: as the engine says.
            seen: its micro-batches.

        Raises:
            InputError: too many in a row were skipped.
        """
        flag = LateFlag(taken)
        self.hear()
        # The images and feature maps of a step are not kept for so long.
        teachers = [micro.teacher for micro in seen if micro.teacher is not None]
        self._pending = _Step(step, flag, [Outputs(each.features, each.logits) for each in teachers])

    def hear(self) -> None:
        """Wait for the step that was begun last, as must be done before anything of it is shown, measured or saved.

        Every rank must call this.

        Raises:
            InputError: as in `add`.
        """
        step, self._pending = self._pending, None
        if step is None:
            return
        if step.taken.read():
            self.guard.taken()
            return
        self._run.skipped_steps += 1
        blamed = sum(self._run.cluster.gather(_not_finite(step.answers)))
        reason = f" (the teacher's answers to {blamed} images are not)" if blamed else ""
        self._say(f"step {step.number}: loss or gradient not finite, skipped{reason}")
        self.guard.skipped(step.number)


def _not_finite(answers: Iterable[Outputs]) -> int:
    """How many rows; waits for the device."""
    return sum(
        int((~(each.features.isfinite().all(1) & each.logits.isfinite().all(1))).sum()) for each in answers
    )
