"""When a run has skipped so many steps in a row that it makes no sense to go on."""

from kdav_fast.errors import InputError


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
