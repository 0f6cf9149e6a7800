"""When a run has skipped so many steps that it makes no sense to go on, or that it should be told."""

from collections.abc import Iterable

from kdav_fast.errors import InputError
from kdav_fast.models.outputs import Outputs


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


def not_finite(answers: Iterable[Outputs | None]) -> int:
    """How many of a teacher's rows are not finite; waits for the device."""
    return sum(
        int((~(each.features.isfinite().all(1) & each.logits.isfinite().all(1))).sum())
        for each in answers
        if each is not None
    )
