"""Ending the process at once, from any thread and at any moment."""

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

_TIME = 2.0
"""Seconds for what there is to do before: a file system or a reader may be gone."""
_actions: list[Callable[[], None]] = []
_ending = threading.Lock()


def before_end(action: Callable[[], None]) -> Callable[[], None]:
    """Do something should the process end by `end_process`; returns what takes that back."""
    _actions.append(action)

    def forget() -> None:
        with suppress(ValueError):
            _actions.remove(action)

    return forget


def end_process(code: int, line: str = "") -> NoReturn:
    """End with an exit code and a line on stderr, waiting for nobody: neither for threads nor for exit handlers."""
    _ending.acquire()  # the first one's reason counts
    last = threading.Thread(target=_finish, args=(line,), daemon=True)
    last.start()
    last.join(_TIME)
    os._exit(code)


def _finish(line: str) -> None:
    if line:
        start = "\n" if os.isatty(2) else ""  # after a progress bar, or ^C
        with suppress(OSError):
            os.write(2, f"{start}{line}\n".encode())
    for action in reversed(_actions):
        with suppress(Exception):
            action()
    if "multiprocessing" in sys.modules:
        for child in sys.modules["multiprocessing"].active_children():
            child.kill()  # they would only find out later
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, or its reader is gone
            stream.flush()
