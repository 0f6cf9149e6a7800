"""What a complete run leaves: the student first, then the report."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from kdav_fast.errors import InputError, one_line
from kdav_fast.runtime.processes import say
from kdav_fast.runtime.run_lock import RunLock
from kdav_fast.student.file import FILE_NAME, write_student
from kdav_fast.tracking.class_results import write_class_results
from kdav_fast.tracking.report import PAGE, write_report
from kdav_fast.train.run import Run

REPORT = "report"


def write_results(run: Run, lock: RunLock) -> None:
    """Write the student, then the report; raises `InputError` if the student cannot be written."""
    run_dir = run.run_dir
    with run.savable():
        weights = run.evaluated_student.weights()
    by_class = run.tally.results(run.loaders.classes, run.cluster)

    def write() -> None:
        lock.check()
        _require_finite(weights, run_dir)
        _try("table of the classes", lambda: write_class_results(run_dir, by_class, run.steps))
        with suppress(OSError):  # of fewer epochs: that there is none says that one is to be written
            (run_dir / REPORT / PAGE).unlink()
        try:
            write_student(run_dir / FILE_NAME, weights, run.card(run.steps))
        except OSError as error:
            raise InputError(
                f"run_dir {run_dir}: the student could not be written ({error.strerror}); put that right, then the "
                "same command writes it"
            ) from None
        _write_own_report(run_dir)

    run.cluster.on_first(write)


def write_missing_report(run_dir: Path) -> None:
    """Of a complete run, whose student was written and whose report was not."""
    if not (run_dir / REPORT / PAGE).exists():
        _write_own_report(run_dir)


def _write_own_report(run_dir: Path) -> None:
    what = f"report, which 'kdav report {run_dir}' makes later,"
    _try(what, lambda: write_report({run_dir.name: run_dir}, run_dir / REPORT, title=str(run_dir)))


def _try(what: str, write: Callable[[], object]) -> None:
    """Write what a run can do without: whatever goes wrong with it takes nothing from the student."""
    try:
        write()
    except Exception as error:  # a plotting library fails in as many ways as there are fonts and numbers
        say(f"warning: the {what} could not be written ({one_line(error)}); the student is not affected")


def _require_finite(weights: dict[str, Tensor], run_dir: Path) -> None:
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(
                f"run_dir {run_dir}: {name} of the trained student is not finite, so it is not written; train with a "
                "lower optimizer.lr or train.clip_grad_norm in another run_dir"
            )
