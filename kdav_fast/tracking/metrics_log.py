"""A run's numbers on disk: `metrics.jsonl` for programs, TensorBoard events for people."""

import json
import math
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from kdav_fast.errors import InputError
from kdav_fast.runtime.files import write_whole

FILE_NAME = "metrics.jsonl"
_BEFORE_ALL = -(2**31)


class MetricsLog:
    """Writes one flat JSON object a line, and every number of it as a TensorBoard scalar of the same name.

    Only one process of a run may hold it. Whatever an earlier attempt logged beyond `resume_step` is
    dropped from the file and hidden in TensorBoard, because those steps are about to be taken again.

    Args:
        run_dir: the run's folder; made if needed. Events go to `run_dir/tensorboard`.
        resume_step: the optimizer step that was restored, below 0 for what comes before distillation; `None` starts
            from nothing.

    Raises:
        InputError: the folder cannot be written, or `metrics.jsonl` holds something else than metrics.
    """

    def __init__(self, run_dir: Path, resume_step: int | None):
        last_step = _BEFORE_ALL if resume_step is None else resume_step
        path = run_dir / FILE_NAME
        self._run_dir = run_dir
        try:
            kept = [line for line in _read_lines(path) if line["step"] <= last_step] if path.exists() else []
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = path.open("a", encoding="utf-8")
            self._events = _Events(run_dir / "tensorboard", last_step + 1)
        except OSError as error:
            raise InputError(
                f"run_dir {run_dir}: {error.strerror}; give a folder that can be written"
            ) from None

    def write(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Log `values` at optimizer step `step`, which is also the line's first key.

        JSON has no NaN or infinity: they become null in the file. TensorBoard shows them as they are.

        Raises:
            InputError: a file cannot be written, as on a full disk.
        """
        line = {"step": step, **{key: _as_json(value) for key, value in values.items()}}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            self._events.write(step, {k: v for k, v in values.items() if not isinstance(v, str)})
        except OSError as error:
            raise InputError(
                f"run_dir {self._run_dir}: the metrics of step {step} could not be written ({error.strerror}); put "
                "that right, then the same command continues from the last checkpoint"
            ) from None

    def close(self) -> None:
        for file in (self._file, self._events):
            with suppress(OSError):  # `write` has told it
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Events:
    """A TensorBoard file, complete after every `write`: a killed run must have its events up to its last checkpoint.

    torch's `SummaryWriter` would write them in a thread, where nobody can catch the error of a full disk.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        # Imported here: who only reads metrics does not wait for torch.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import scalar

        self._event, self._scalar = Event, scalar
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("wb"))
        self._add(file_version="brain.Event:2")
        # Hides what an earlier attempt wrote of this step and later ones.
        self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        self._records.flush()

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._add(step=step, summary=self._scalar(key, value))
        self._records.flush()

    def close(self) -> None:
        self._records.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, oldest first; null values are `None`.

    A last line without its newline is one that is being written, or was when the run was killed: it is
    left out.

    Raises:
        InputError: there is no such file, it cannot be read, or a line is not a metrics line.
    """
    path = run_dir / FILE_NAME
    try:
        return _read_lines(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a run's folder, which holds {FILE_NAME}") from None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    *complete, _torn = path.read_bytes().split(b"\n")
    return [_parse(text, path, number) for number, text in enumerate(complete, start=1)]


def _parse(text: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):  # also covers bytes that are not UTF-8
        line = None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise InputError(f'{path} line {number} is not a JSON object with a whole "step"; delete that line')
    return line


def _as_json(value: float | int | str) -> float | int | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
