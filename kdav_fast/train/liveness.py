"""Which process of a run was lost: a failed collective tells only that a connection broke or that time ran out.

Each process beats: a thread changes the process's own entry in a store on rank 0 about once a second. After
a failed collective the survivors watch the entries for a while; whose entry stands still is lost. A process
that ends by its own error leaves the cause in the store, for the others to quote.
"""

import atexit
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from kdav_fast.errors import RankLostError

_CAUSE = "cause"
_LEFT = b"left"


class Liveness:
    """Who of the run's processes still answers.

    All ranks make theirs together, right after the process group. A single process needs no thread and no store.

    Args:
        rank: This process among those of the run.
        world: The number of processes.
        group: A process group over the hosts' CPUs, for the processes to introduce themselves; default: the
            default group.
        beat: Seconds between two signs of life.
        patience: Seconds without any after which a process counts as lost. Long enough for a busy machine, and
            for a main thread that holds Python's lock.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        group: dist.ProcessGroup | None = None,
        beat: float = 1.0,
        patience: float = 10.0,
    ) -> None:
        self._rank, self._world, self._beat, self._patience = rank, world, beat, patience
        self._host, self._process = socket.gethostname(), os.getpid()
        self._name = f"rank {rank} (host {self._host}, process {self._process})"
        self._thread: threading.Thread | None = None
        if world == 1:
            return
        self._meet(group)
        self._cause = ""  # why the run cannot go on, as the store has it
        self._last_words = ""  # what this process leaves there
        self._entries: list[bytes] = []  # the latest reading, while `lost` asks for it
        self._asked = False
        self._leaving = threading.Event()
        # Only this thread talks to the store: a host that is frozen never answers, and nobody may wait for it.
        self._thread = threading.Thread(target=self._keep_beating, name="liveness", daemon=True)
        self._thread.start()
        self._gave_up = False
        atexit.register(self._end_if_given_up)  # run after `close`: the last registered is the first
        atexit.register(self.close)

    @contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Around all that the processes do together; at its end, this process has left the run.

        A `RuntimeError`, such as that of a failed collective, becomes `RankLostError` if another process is to blame;
        any other exception passes at once. Either way the other ranks get to know the cause. After `RankLostError`,
        the process ends with code 1, whatever it does until then.
        """
        try:
            yield
        except RuntimeError as error:
            own, cause = f"{self._name} ended with {_one_line(error)}", self.lost()
            # The same error on another rank, but for its numbers, is no consequence: it is an ordinary one.
            if not cause or _without_numbers(cause) == _without_numbers(own):
                self._leave(own)
                raise
            self._leave(cause)
            self._gave_up = True
            raise RankLostError(
                f"{cause}; look into its output, then start the same command again: "
                "it continues from the last checkpoint"
            ) from error
        except BaseException as error:
            self._leave(f"{self._name} ended with {_one_line(error)}")
            raise
        self._leave()

    def lost(self) -> str:
        """Which ranks do not answer, or why the first one ended; empty if all are well.

        Takes a few beats, or the whole patience if a rank stays silent. For the main thread only.
        """
        if self._thread is None or self._leaving.is_set():
            return ""
        first, alive = [], set()
        self._entries, self._asked = first, True
        deadline = time.monotonic() + self._patience
        with _outliving_the_launcher():
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
        if not beating or self._rank not in alive:  # our own beats do not arrive either
            return _silent(self._names[:1]) if self._rank > 0 else ""
        return _silent([name for rank, name in enumerate(self._names) if rank not in alive])

    def close(self) -> None:
        """Leave the run, giving the others time to learn why. Happens by itself when the process ends."""
        self._leave()
        if self._thread is not None:
            self._thread.join(self._patience)

    def _end_if_given_up(self) -> None:
        """End the process with code 1, without torch's farewell.

        It waits for all that the lost process still owes, such as its part of a vote: up to the group's half hour.
        """
        if self._gave_up:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # closed, or its reader is gone
                    stream.flush()
            os._exit(1)

    def _meet(self, group: dist.ProcessGroup | None) -> None:
        """Open the store and exchange names: after rank 0's death the others could not ask for its name.

        The store is not that of the process group, which may be gone before all have read the cause.
        """
        address, port = os.environ.get("MASTER_ADDR", self._host), 0
        if self._rank == 0:
            self._store = dist.TCPStore(address, port, is_master=True, wait_for_workers=False)
            port = self._store.port
            for key in (_CAUSE, *map(str, range(self._world))):  # to read a missing key is to wait for it
                self._store.set(key, "")
        met: list[tuple[str, str, int]] = [("", "", 0)] * self._world
        dist.all_gather_object(met, (self._name, address, port), group=group)
        self._names = [name for name, _, _ in met]
        if self._rank > 0:
            self._store = dist.TCPStore(*met[0][1:], is_master=False, wait_for_workers=False)

    def _leave(self, last_words: str = "") -> None:
        if self._thread is not None and not self._leaving.is_set():
            self._last_words = last_words
            self._leaving.set()

    def _keep_beating(self) -> None:
        beats = 0
        try:
            while not self._cause and not self._leaving.wait(self._beat):
                beats += 1
                self._store.set(str(self._rank), str(beats))
                if self._asked:
                    self._entries = self._read_entries()
                self._cause = self._store.get(_CAUSE).decode()
            if self._last_words:
                self._store.compare_set(_CAUSE, "", self._last_words)  # the first cause is that of the others
            self._store.set(str(self._rank), _LEFT)
            if self._rank == 0:
                self._host_until_all_left()
        except RuntimeError:
            return  # no store, hence no rank 0; `lost` sees that this thread has ended

    def _host_until_all_left(self) -> None:
        """The store ends with this process: wait for those who have not read the cause and are not lost."""
        cause = self._cause or self._last_words
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            entries = zip(self._names, self._read_entries(), strict=True)
            if all(entry == _LEFT or name in cause for name, entry in entries):
                return
            time.sleep(self._beat / 10)

    def _read_entries(self) -> list[bytes]:
        return self._store.multi_get([str(rank) for rank in range(self._world)])


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


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
