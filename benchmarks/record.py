"""A benchmark's result, on the disk as soon as it is measured: whatever ends the program, the same command goes on.

What is measured stays as it was written. It counts only for the same settings, device, code and versions of packages.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from kdav_fast.runtime.files import write_whole

GO_ON = 75
"""Exit code of a program that must be started again for the rest: a CUDA error stays with its process."""
ATTEMPTS = 2
LONGEST = 300
"""Characters of an error in a table."""


class NeverEndedError(RuntimeError):
    """What has ended the whole program each time it was tried: a crash, or a hang that hears of no limit."""


class Record:
    """The result file of one benchmark, from its first measurement on.

    Args:
        path: of the file.
        environment: from `environment.describe`.
        settings: all else that decides what is measured.
        derive: what follows from the rows, in the file for whoever reads it.
        name: of the list that is measured, where the rows are made of it.
    """

    def __init__(
        self,
        path: Path,
        environment: dict[str, Any],
        settings: dict[str, Any],
        derive: Callable[[list[dict]], dict[str, Any]] = lambda rows: {},
        name: str = "rows",
    ) -> None:
        self._path, self._derive, self._name = path, derive, name
        self._head = {"environment": environment, "settings": json.loads(json.dumps(settings))}
        earlier = self._earlier()
        self.rows: list[dict] = earlier.get(name, [])
        """What is measured, in that order."""
        self._kept: dict[str, Any] = earlier.get("kept", {})
        self._begun: dict[str, int] = earlier.get("begun", {})
        signal.signal(signal.SIGTERM, _end)
        if self.rows:
            print(f"going on with {path.name}: {len(self.rows)} {name} are there", flush=True)

    def find(self, **key: object) -> list[dict]:
        """The rows with these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in key.items())]

    def add(self, *rows: dict) -> None:
        """Rows that were measured together: all of them are in the file when this returns, or none."""
        self.rows += rows
        self.write()

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """What is found out once for all rows, such as the device's rates."""
        if name not in self._kept:
            self._kept[name] = make()
            self.write()
        return self._kept[name]

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Around what may end the program.

        Raises:
            NeverEndedError: it did, the last times.
        """
        if self._begun.get(what, 0) >= ATTEMPTS:
            raise NeverEndedError(f"it ended the whole program {ATTEMPTS} times: a crash or a hang")
        self._begun[what] = self._begun.get(what, 0) + 1
        self.write()
        ended = True  # by the program itself, not by an error
        try:
            yield
            ended = False
        except Exception:
            ended = False
            raise
        finally:
            del self._begun[what]
            if ended:  # else the file learns it with what is written next
                self.write()

    def write(self) -> dict[str, Any]:
        """Bring the file up to date; returns what is in it."""
        result = {**self._head, self._name: self.rows}
        result |= {name: value for name, value in (("kept", self._kept), ("begun", self._begun)) if value}
        result |= self._derive(self.rows)
        write_whole(self._path, json.dumps(result, indent=1) + "\n")
        return result

    def _earlier(self) -> dict[str, Any]:
        """What the file holds of an earlier attempt at the same; nothing if there is none."""
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            same = found["settings"] == self._head["settings"] and _same_place(
                found["environment"], self._head["environment"]
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return found if same else {}


def _end(number: int, frame: object) -> NoReturn:
    """A limit that is over is not held against what is being measured; only what cannot hear of it is."""
    sys.exit(128 + number)


def _same_place(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether figures of both may stand in one table. No figure is of a package that was not installed."""
    versions = now["versions"]
    changed = [
        package
        for package, version in before["versions"].items()
        if None not in (version, versions.get(package)) and version != versions[package]
    ]
    return not changed and all(
        before.get(key) == now.get(key) for key in ("device", "threads", "cores", "python", "code")
    )


def failure(error: Exception) -> str:
    """What a row says instead of figures: the kind of error, and the first line of what it says."""
    text = str(error).strip()
    name = type(error).__name__
    return f"{name}: {text.splitlines()[0][:LONGEST]}" if text else name


def leave_if_broken(error: Exception) -> None:
    """End the program, to be started again, if the error has broken CUDA for the whole process."""
    if "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError":
        print("CUDA is broken in this process: the same command goes on", file=sys.stderr)
        sys.exit(GO_ON)
