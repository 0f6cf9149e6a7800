"""A run's numbers on disk: `metrics.jsonl` for programs, TensorBoard events for people."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from kdav_fast.errors import InputError

FILE_NAME = "metrics.jsonl"


class MetricsLog:
    """Writes one flat JSON object a line, and every number of it as a TensorBoard scalar of the same name.

    Only one process of a run may hold it. Whatever an earlier attempt logged beyond `resume_step` is
    dropped from the file and hidden in TensorBoard, because those steps are about to be taken again.

    Args:
        run_dir: the run's folder; made if needed. Events go to `run_dir/tensorboard`.
        resume_step: the optimizer step that was restored; `None` starts from nothing.

    Raises:
        InputError: the folder cannot be written, or `metrics.jsonl` holds something else than metrics.
    """

    def __init__(self, run_dir: Path, resume_step: int | None):
        last_step = -1 if resume_step is None else resume_step
        path = run_dir / FILE_NAME
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            kept = [line for line in _read_lines(path) if line["step"] <= last_step] if path.exists() else []
            _replace_lines(path, kept)
            self._file = path.open("a", encoding="utf-8")
            self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_step + 1)
        except OSError as error:
            raise InputError(
                f"run_dir {run_dir}: {error.strerror}; give a folder that can be written"
            ) from None

    def write(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Log `values` at optimizer step `step`, which is also the line's first key.

        JSON has no NaN or infinity: they become null in the file. TensorBoard shows them as they are.
        """
        line = {"step": step, **{key: _as_json(value) for key, value in values.items()}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for key, value in values.items():
            if not isinstance(value, str):
                self._events.add_scalar(key, value, step)
        # A killed run must have its events up to its last checkpoint, or the resumed curves have a hole.
        self._events.flush()

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


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
    except ValueError:  # also covers bytes that are not UTF-8
        line = None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise InputError(f'{path} line {number} is not a JSON object with a whole "step"; delete that line')
    return line


def _replace_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """All or nothing: a crash in here leaves the old file."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _as_json(value: float | int | str) -> float | int | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
