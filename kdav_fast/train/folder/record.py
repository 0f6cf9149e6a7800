"""What a run writes down and shows while it trains."""

from contextlib import ExitStack
from typing import Self

from kdav_fast.distillers.phases import Fit
from kdav_fast.runtime.run_lock import RunLock
from kdav_fast.tracking.metrics_log import MetricsLog
from kdav_fast.tracking.status import StatusLine
from kdav_fast.train.checkpoints import Position
from kdav_fast.train.phases import PhasePosition, batches_of
from kdav_fast.train.run import Run


class Record:
    """The log of rank 0 and its status line; on other ranks nothing. A context manager.

    Steps before distillation count up to 0.

    Args:
        run: whose.
        position: where it was restored; None: it begins.
        lock: checked before anything is written.
    """

    def __init__(self, run: Run, position: Position | None, lock: RunLock) -> None:
        self._run, self._lock = run, lock
        self._status: StatusLine | None = None
        self._log: MetricsLog | None = None
        self._stack = ExitStack()
        if run.cluster.is_first:
            done = position and (
                self._phase_step(position.phases) if position.step is None else position.step
            )
            self._log = self._stack.enter_context(MetricsLog(run.run_dir, done))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def begin_training(self, step: int) -> None:
        """Show the bar from `step` on."""
        self._status = StatusLine(self._run.cluster, step, self._run.steps)
        self._stack.callback(self._status.close)
        if step:
            self._status.say(f"continuing {self._run.run_dir} after step {step}")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Log and show the metrics of a step."""
        self._write(step, {"epoch": self._run.epoch(step), **values})
        if self._log is not None:
            self._status.show(step, values)

    def phase(self, position: PhasePosition, values: dict[str, float]) -> None:
        """Log the metrics of a batch before distillation."""
        self._write(self._phase_step(position), values)

    def say(self, text: str) -> None:
        """A line that does not tear the bar."""
        self._status.say(text)

    def advance(self) -> None:
        """One optimizer step is done."""
        self._status.advance()

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._log is not None:
            self._lock.check()
            self._log.write(step, values)

    def _phase_step(self, position: PhasePosition) -> int:
        """Minus the batches of training that are still to come before distillation."""
        phases = tuple(self._run.distiller.phases())
        left = [batches_of(self._run, phase) for phase in phases[position.number :] if isinstance(phase, Fit)]
        in_fit = position.number < len(phases) and isinstance(phases[position.number], Fit)
        return (position.step if in_fit else 0) - sum(left)
