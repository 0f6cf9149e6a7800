"""Ctrl-C that ends a command at once, in one line.

Python calls a signal's handler in the main thread between two instructions: late, if that waits inside a library, and
an exception raised there may hit an import, a finaliser or the wait for threads at the very end. So here the handlers
do nothing, and a thread that reads the numbers of arriving signals ends the process.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Self

from kdav_fast.runtime.ending import end_process

INTERRUPTED = 130
"""Exit code: ended at once by Ctrl-C, as a shell counts it."""
STOPPED = 75
"""Exit code: stopped by a signal with the state saved; the same command continues (sysexits' EX_TEMPFAIL)."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""What stops a run; SIGHUP comes when the terminal or the connection is closed."""

terminations: list[Callable[[], str]] = []
"""Asked when SIGTERM is about to end the process: a line that says which error made somebody send it, if one did."""
_listening: "Interrupts | None" = None


def heeded(numbers: Iterable[int] = STOP_SIGNALS) -> list[int]:
    """Those signals that are not to be ignored: `nohup` has SIGHUP ignored."""
    return [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def ends_at_once() -> bool:
    """Whether a second Ctrl-C needs nobody's help."""
    return _listening is not None


class Interrupts:
    """Of a process that belongs to one command; a library leaves the signals alone.

    Where somebody else has taken a signal's handler, as `StopRequest` does while a run trains, the first signal is
    theirs; a Ctrl-C after it ends the process.

    Args:
        speaks: whether this process tells it, of several.
    """

    def __init__(self, speaks: bool = True) -> None:
        self._speaks = speaks
        self._stopping = False
        self._code: int | None = None
        self._remark = ""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        global _listening
        if threading.current_thread() is not threading.main_thread() or _listening is not None:
            return self  # only the main thread may, and once is enough
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._former_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        _listening = self
        threading.Thread(target=self._listen, name="interrupts", daemon=True).start()
        self._take([signal.SIGINT])
        return self

    def __exit__(self, *exception: object) -> None:
        global _listening
        if _listening is not self:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_writer)
        _listening = None
        os.close(self._writer)  # ends the thread

    def expect_stops(self, remark: str) -> None:
        """From now on, every signal that stops a run ends the process at once where nobody else has taken it.

        Args:
            remark: what the user can do then.
        """
        self._remark = remark
        if _listening is self:
            self._take(heeded())

    def finish(self, code: int) -> None:
        """The command is done: a Ctrl-C from now on ends the process with its code, without a word."""
        self._code = code

    def _take(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number not in self._previous:
                self._previous[number] = signal.signal(number, _do_nothing)

    def _listen(self) -> None:
        while numbers := os.read(self._reader, 64):
            for number in numbers:
                if number in self._previous:
                    self._receive(signal.Signals(number))
        os.close(self._reader)

    def _receive(self, number: signal.Signals) -> None:
        if self._code is not None:
            end_process(self._code)
        if signal.getsignal(number) is not _do_nothing and not (self._stopping and number == signal.SIGINT):
            self._stopping = True
            return
        for ask in terminations if number == signal.SIGTERM else ():
            if error := ask():
                end_process(1, error)
        interrupted = number == signal.SIGINT
        text = "interrupted" if interrupted else f"stopped by {number.name}"
        line = f"kdav: {text}{self._remark and '; '}{self._remark}" if self._speaks else ""
        end_process(INTERRUPTED if interrupted else STOPPED, line)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Python writes down a signal for the thread only where it has a handler."""


def _leave_the_signals_to_the_parent() -> None:
    """In a forked child, which would write to the parent's pipe. Ctrl-C reaches both; the parent ends the child."""
    global _listening
    if _listening is None:
        return
    signal.set_wakeup_fd(-1)
    for number in _listening._previous:
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    _listening = None


os.register_at_fork(after_in_child=_leave_the_signals_to_the_parent)
