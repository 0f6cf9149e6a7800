"""Which process of a run was lost: a failed collective tells only that a connection broke or that time ran out.

Each process beats: a thread changes the process's own entry in a store on rank 0 about once a second. Rank 0 watches
all entries and the others watch rank 0's; whose entry stands still for too long is lost, much sooner if its connection
is closed too. A process that ends by its own error leaves the cause in the store, for the others to quote. Another
thread ends the process where the main one waits for somebody who is lost, wherever that may be: inside a collective
that never fails, for a device on which it runs, or in a library. Only who keeps Python's lock cannot be helped so.
"""

import atexit
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch.distributed as dist

from kdav_fast.errors import InputError, RankLostError, named
from kdav_fast.runtime.connections import Connections
from kdav_fast.runtime.ending import before_end, end_process
from kdav_fast.runtime.interrupts import terminations
from kdav_fast.runtime.meeting import Meeting, claim, gather_all, look

_CAUSE = "cause"
_LEFT = b"left"
_INPUT = "bad input: "
"""Begins a cause that the user can put right."""
_CLEANING = 3
"""Patiences that a process which has named the cause may take to end by itself."""


class Liveness:
    """Who of the run's processes still answers.

    A single process needs no thread and no store.

    Args:
        rank: This process among those of the run.
        world: The number of processes.
        meeting: Where they meet; None for a single process.
        silence: Seconds without a sign of life after which the run ends wherever it is, naming who is silent.
        beat: Seconds between two signs of life.
        patience: Seconds without any after which a process counts as lost when something has failed or its connection
            is closed. Long enough for a busy machine, and for a main thread that holds Python's lock.

    Raises:
        InputError: another process has this rank.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        meeting: Meeting | None = None,
        silence: float = 600.0,
        beat: float = 1.0,
        patience: float = 10.0,
    ) -> None:
        self._rank, self._world, self._beat, self._patience = rank, world, beat, patience
        self._silence = max(silence, patience)
        self._name = f"rank {rank} (host {socket.gethostname()}, process {os.getpid()})"
        self._names = [f"rank {r}" for r in range(world)]
        self._thread: threading.Thread | None = None
        if world == 1:
            return
        self._meeting = meeting
        # Of a connection its own, since only its thread may wait for a host that is frozen.
        self._store = dist.PrefixStore(meeting.next_run(), meeting.store())
        claim(self._store, rank, self._name)
        self._connections, self._closed = Connections(self._store, rank), set()
        self._cause = ""  # why the run cannot go on, as the store has it
        self._last_words = ""  # what this process leaves there
        self._entries: list[bytes] = []  # the latest reading, while `lost` asks for it
        self._asked = self._all_here = self._settling = self._told = False
        self._answers = 0  # of rank 0's store
        self._leaving = threading.Event()
        # Only this thread talks to the store: a host that is frozen never answers, and nobody may wait for it.
        self._thread = threading.Thread(target=self._keep_beating, name="liveness", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, name="liveness-watch", daemon=True).start()
        self._exit_code: int | None = None  # since it was given up
        self._forget_end = before_end(self._leave_in_haste)
        terminations.append(self._why_terminated)
        atexit.register(self._end_if_given_up)  # run after `close`: the last registered is the first
        atexit.register(self.close)

    @property
    def names(self) -> list[str]:
        """Each rank with its host and process number, once all have met."""
        return self._names

    def meet(self, facts: Mapping[str, str], timeout: float) -> dist.Store | None:
        """Wait until all processes are here with the same facts; returns a store for their process group.

        Raises:
            InputError: facts differ.
            RankLostError: somebody did not come within `timeout` seconds, or cannot begin.
        """
        if self._world == 1:
            return None
        store = dist.PrefixStore(f"run {self._meeting.runs}", self._meeting.store())
        self._store.set(str(self._rank), "0")
        self._names = gather_all(store, self._rank, self._world, facts, timeout, _CAUSE)
        self._connections.connect(store, self._meeting.address)
        self._all_here = True
        return dist.PrefixStore("group", store)

    @contextmanager
    def naming_lost_ranks(self, stay: bool = False) -> Iterator[None]:
        """Around all that the processes do together; at its end, this process has left the run, unless it stays.

        A `RuntimeError`, such as that of a failed collective, becomes `RankLostError` if another process is to blame;
        any other exception passes at once. Either way the other ranks get to know the cause; an `InputError` becomes
        theirs too. After an error of another process, this one ends with the error's exit code, whatever it does
        until then.
        """
        try:
            yield
        except RankLostError as error:
            self._settling = True
            cause = self._cause_so_far() or str(error)
            self._leave(cause)
            raise self._given_up(cause) from error
        except InputError as error:
            self._leave(f"{_INPUT}{self._name}: {error}")
            raise
        except RuntimeError as error:
            self._settling = True
            own, cause = f"{self._name} ended with {named(error)}", self.lost()
            # The same error on another rank, but for its numbers, is no consequence: it is an ordinary one.
            if not cause or _without_numbers(cause) == _without_numbers(own):
                self._leave(own)
                raise
            self._leave(cause)
            raise self._given_up(cause) from error
        except BaseException as error:
            self._leave(f"{self._name} ended with {named(error)}")
            raise
        if not stay:
            self._leave()

    def _cause_so_far(self) -> str:
        """Why the run cannot go on, if somebody has said so; takes a few beats."""
        deadline = time.monotonic() + 3 * self._beat
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < deadline:
            if self._cause:
                break
            time.sleep(self._beat / 10)
        return self._cause if self._thread is not None else ""

    def _given_up(self, cause: str) -> RankLostError | InputError:
        error = self._as_error(cause)
        self._exit_code = _exit_code(error)
        # What is cleaned up on the way may wait for a device that waits for who is lost, or for another thread.
        guard = threading.Timer(_CLEANING * self._patience, end_process, [self._exit_code])
        guard.daemon = True
        guard.start()
        return error

    @staticmethod
    def _as_error(cause: str) -> RankLostError | InputError:
        if cause.startswith(_INPUT):
            return InputError(cause.removeprefix(_INPUT))
        if "start the same command again" in cause:
            return RankLostError(cause)
        return RankLostError(
            f"{cause}; look into its output, then start the same command again: "
            "it continues from the last checkpoint"
        )

    def lost(self) -> str:
        """Which ranks do not answer, or why the first one ended; empty if all are well.

        Takes a few beats, or the whole patience if a rank stays silent. For the main thread only.
        """
        if self._thread is None or self._leaving.is_set():
            return ""
        with _outliving_the_launcher():
            return self._look_for_lost()

    def _look_for_lost(self) -> str:
        first, alive = [], set()
        self._entries, self._asked = first, True
        deadline = time.monotonic() + self._patience
        while True:
            beating = self._thread.is_alive()  # asked before the cause, which the thread reads last
            if self._cause:
                return self._cause
            entries = self._entries
            first = first or entries
            pairs = enumerate(zip(first, entries, strict=True))
            alive |= {rank for rank, (before, now) in pairs if now != before or now == _LEFT}
            if len(alive) == self._world:
                return ""
            if not beating or time.monotonic() > deadline:
                break
            time.sleep(self._beat / 10)
        if beating and not self._all_here:
            return ""
        if not beating or self._rank not in alive:  # our own beats do not arrive either
            return _silent(self._names[:1]) if self._rank > 0 else ""
        return _silent([name for rank, name in enumerate(self._names) if rank not in alive])

    def close(self) -> None:
        """Leave the run, giving the others time to learn why. Happens by itself when the process ends."""
        self._leave()
        if self._thread is not None:
            self._thread.join(self._patience + 1)

    @property
    def told(self) -> bool:
        """Whether the store has heard that, and why, this process left."""
        return self._told

    def _end_if_given_up(self) -> None:
        """End the process without torch's farewell.

        It waits for all that the lost process still owes, such as its part of a vote: up to the group's half hour.
        """
        if self._exit_code is not None:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # closed, or its reader is gone
                    stream.flush()
            os._exit(self._exit_code)

    def _leave(self, last_words: str = "") -> None:
        if self._thread is not None and not self._leaving.is_set():
            self._last_words = last_words
            self._leaving.set()
            self._forget_end()
            terminations.remove(self._why_terminated)

    def _leave_in_haste(self) -> None:
        """The process ends at once, by its user's wish."""
        if not self._leaving.is_set():
            self._last_words = f"{self._name} was ended by a signal"
            self._leaving.set()
            self._thread.join(self._beat)

    def _keep_beating(self) -> None:
        beats, watched = 0, _Watched(self._silence, self._patience)
        try:
            while not self._cause and not self._leaving.wait(self._beat):
                beats += 1
                self._store.set(str(self._rank), str(beats))
                if self._all_here:
                    if self._asked:
                        self._entries = self._read_entries()
                    silent = watched.silent(self._entries_to_watch(), self._closed)
                    if silent:
                        lost = _silent([self._names[rank] for rank in silent])
                        self._store.compare_set(_CAUSE, "", lost)
                self._cause = look(self._store, _CAUSE)
                self._answers += 1
            if self._last_words:
                self._store.compare_set(_CAUSE, "", self._last_words)  # the first cause is that of the others
            self._store.set(str(self._rank), _LEFT)
            self._told = True
            if self._rank == 0:
                self._host_until_all_left()
        except RuntimeError:
            return  # no store, hence no rank 0; `lost` sees that this thread has ended

    def _entries_to_watch(self) -> dict[int, bytes]:
        """Of many processes, all entries would be too many for all to read each second: rank 0 does."""
        if self._rank > 0:
            return {0: self._store.get("0")}
        return dict(enumerate(self._read_entries()))

    def _watch(self) -> None:
        """End the process should the main thread not come back from waiting for who is lost."""
        grace, watched = self._patience / 2, _Watched(self._silence, self._patience)
        while not self._leaving.wait(self._beat / 2):
            if self._all_here:
                self._closed = self._connections.closed()
            if self._settling:
                continue
            ended = not self._thread.is_alive()
            if self._cause or ended:
                if not self._leaving.wait(grace) and not self._settling:
                    self._end_by(self._cause or _silent(self._names[:1]))
            elif self._rank > 0 and watched.silent({0: self._answers}, self._closed):
                self._end_by(_silent(self._names[:1]))
        self._connections.close()

    def _end_by(self, cause: str) -> None:
        error = self._as_error(cause)
        speaks = self._rank == 0 or not isinstance(error, InputError)
        self._leave(cause)
        end_process(_exit_code(error), f"kdav: error: {error}" if speaks else "")

    def _why_terminated(self) -> str:
        """Where one process died, its launcher ends the others: the line that says so; empty if all are well."""
        cause = "" if self._leaving.is_set() else self._look_for_lost()
        return f"kdav: error: {self._as_error(cause)}" if cause else ""

    def _host_until_all_left(self) -> None:
        """The store ends with this process: wait for those who have not read the cause and are not lost."""
        cause = self._cause or self._last_words
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            entries = {name: look(self._store, str(rank)) for rank, name in enumerate(self._names)}
            lost = [] if cause.startswith(_INPUT) else [name for name in self._names if name in cause]
            if all(entry == _LEFT.decode() or name in lost for name, entry in entries.items()):
                return
            time.sleep(self._beat / 10)

    def _read_entries(self) -> list[bytes]:
        return self._store.multi_get([str(rank) for rank in range(self._world)])


class _Watched:
    """For how long each entry stands still.

    By a clock of its own, which stands still as well while this process is suspended: the others may have been, too.
    """

    def __init__(self, silence: float, patience: float) -> None:
        self._silence, self._patience = silence, patience
        self._now, self._looked = 0.0, time.monotonic()
        self._last: dict[int, tuple[object, float]] = {}

    def silent(self, entries: Mapping[int, object], closed: Collection[int] = ()) -> list[int]:
        """Whose entry has not changed for too long, which is less for those whose connections are closed."""
        moment = time.monotonic()
        self._now += min(moment - self._looked, self._patience / 2)
        self._looked = moment
        for rank, entry in entries.items():
            if rank not in self._last or self._last[rank][0] != entry or entry == _LEFT:
                self._last[rank] = (entry, self._now)
        return [rank for rank in entries if self._now - self._last[rank][1] > self._allowed(rank in closed)]

    def _allowed(self, closed: bool) -> float:
        return self._patience if closed else self._silence


def _exit_code(error: Exception) -> int:
    return 2 if isinstance(error, InputError) else 1


def _without_numbers(cause: str) -> str:
    return re.sub(r"\d+", "", cause.partition(" ended with ")[2])


def _silent(names: list[str]) -> str:
    return f"{' and '.join(names)} no longer answer{'s' if len(names) == 1 else ''}"


@contextmanager
def _outliving_the_launcher() -> Iterator[None]:
    """Ignore SIGTERM: where one process died, the launcher ends the others before they can tell which."""
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
