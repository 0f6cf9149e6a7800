"""Something that happens in the middle of a run."""

import signal
from collections.abc import Callable

import pytest

from kdav_fast.tracking.status import StatusLine


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Do something once `step` optimizer steps of a run in this process are done."""
    taken = 0

    def advance(self: StatusLine) -> None:
        nonlocal taken
        taken += 1
        if taken == step:
            action()

    monkeypatch.setattr(StatusLine, "advance", advance)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal once `step` optimizer steps of a run are done."""
    after_step(monkeypatch, step, lambda: signal.raise_signal(number))
