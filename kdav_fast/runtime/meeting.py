"""Where the processes of a run meet before they work together: a store on the first one, at MASTER_ADDR:MASTER_PORT.

torch's own meeting waits half an hour and tells nobody who is missing, nor that one came with other settings.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from datetime import timedelta

import torch.distributed as dist

from kdav_fast.errors import InputError, RankLostError, one_line
from kdav_fast.runtime.agreement import difference

_POLL, _NAMING, _GRACE = 0.1, 60.0, 5.0
"""Seconds: between two looks, for a host's name to be known, and beyond the timeout of torch's own."""


class Meeting:
    """This process's way to the store. A first process must stay until the others have left.

    Args:
        rank: this process among those of the run.
        world: how many there are.
        timeout: seconds to wait for others.

    Raises:
        InputError: the environment does not say where to meet, or the port there is taken.
        RankLostError: the first process does not come.
    """

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        self.rank, self.world, self._timeout = rank, world, timeout
        self._deadline = time.monotonic() + timeout
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise InputError(
                f"WORLD_SIZE is {world} but {' and '.join(missing)} is not set; start the processes with a launcher, "
                "or set where rank 0 is to be found"
            )
        self.address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise InputError(f"MASTER_PORT is {port!r}; it must be a number from 1 to 65535")
        self.port = int(port)
        self._launcher_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.server = self._open(host=rank == 0 and not self._launcher_hosts)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the launcher's store outlives it
        self._prefix = f"kdav {attempt}"
        self.runs = 0
        """How many runs began in this process."""

    def _open(self, host: bool) -> dist.TCPStore:
        if host:
            self._wait_for_name()
        else:
            self._wait_for_port()
        try:
            return self._connect(host)
        except RankLostError:
            raise
        except RuntimeError as error:
            if not host:
                raise RankLostError(
                    f"{self._first()} answered and left again; look into its output"
                ) from error
            reason = "it is in use" if "EADDRINUSE" in str(error) else one_line(error)
            raise InputError(
                f"MASTER_PORT {self.port} of host {socket.gethostname()} cannot be used: {reason}; another run may "
                "have it: give another one (--master_port of the deepspeed launcher)"
            ) from None

    def _wait_for_name(self) -> None:
        """A name service may learn the name of a host that has just started a little later."""
        deadline = min(self._deadline, time.monotonic() + _NAMING)
        while True:
            try:
                socket.getaddrinfo(self.address, self.port)
                return
            except (OSError, UnicodeError) as error:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"MASTER_ADDR is {self.address!r}, which cannot be looked up "
                        f"({getattr(error, 'strerror', None) or error}); give the address of the host of rank 0"
                    ) from None
            time.sleep(_POLL)

    def _wait_for_port(self) -> None:
        """By plain sockets: torch's own attempts write warnings with stacks."""
        while True:
            try:
                socket.create_connection((self.address, self.port), timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() > self._deadline:
                    raise RankLostError(
                        f"{self._first()} did not answer within {self._timeout:g} s ({error.strerror or error}); look "
                        "into the output of rank 0, then start the same command again"
                    ) from None
            time.sleep(_POLL)

    def _first(self) -> str:
        return f"rank 0 at {self.address}:{self.port}"

    def store(self) -> dist.Store:
        """Another connection, for who waits long: requests of one connection wait for each other."""
        try:
            return dist.PrefixStore(self._prefix, self._connect())
        except RankLostError:
            raise
        except RuntimeError as error:
            raise RankLostError(f"{self._first()} answered and left again; look into its output") from error

    def _connect(self, host: bool = False) -> dist.TCPStore:
        wait = max(1.0, self._timeout)
        opened = Future()

        def connect() -> None:
            try:
                opened.set_result(
                    dist.TCPStore(
                        self.address,
                        self.port,
                        is_master=host,
                        wait_for_workers=False,
                        timeout=timedelta(seconds=wait),
                    )
                )
            except Exception as error:
                opened.set_exception(error)

        # torch waits without end for another program's server that says nothing.
        threading.Thread(target=connect, name="meeting", daemon=True).start()
        try:
            return opened.result(wait + _GRACE)
        except TimeoutError:
            raise RankLostError(
                f"{self._first()} does not speak as a run's first process does: MASTER_PORT may be another program's; "
                "give another one (--master_port of the deepspeed launcher)"
            ) from None

    def next_run(self) -> str:
        """A name for the next run of these processes, the same on all of them."""
        self.runs += 1
        return f"run {self.runs}"


def look(store: dist.Store, key: str) -> str:
    """A value, empty if there is none: to `get` it would be to wait for it."""
    return store.compare_set(key, "", "").decode()


def claim(store: dist.Store, rank: int, name: str) -> None:
    """Take this rank's place, which only one process can have; `InputError` for another one."""
    there = store.compare_set(f"name {rank}", "", name).decode()
    if there != name:
        error = InputError(
            f"RANK {rank} is already taken by {there}; each process needs a RANK of its own, each run its MASTER_PORT"
        )
        error.told = False
        raise error


def gather_all(
    store: dist.Store, rank: int, world: int, facts: Mapping[str, str], timeout: float, cause: str
) -> list[str]:
    """Wait until every process has come and has the same facts; returns their names in rank order.

    Args:
        store: of this run; places in it are claimed.
        rank, world: this process, and how many there are.
        facts: this process's.
        timeout: seconds to wait for the last one.
        cause: the key under which somebody may write why the run cannot begin.

    Raises:
        InputError: facts differ.
        RankLostError: somebody did not come in time, or another process left a cause.
    """
    store.set(f"facts {rank}", json.dumps(dict(facts)))
    store.add("arrived", 1)
    deadline = time.monotonic() + timeout
    names: dict[int, str] = {}
    own = (look(store, f"name {rank}"), facts)
    while True:
        if left := look(store, cause):
            raise RankLostError(left)
        if rank == 0:
            here = [r for r in range(world) if r not in names and look(store, f"facts {r}")]
            for other in here:
                names[other] = look(store, f"name {other}")
                unlike = difference([own, (names[other], json.loads(look(store, f"facts {other}")))])
                if unlike:
                    raise InputError(unlike)
            if len(names) == world:
                store.set("all here", "yes")
        if look(store, "all here"):
            return [look(store, f"name {r}") for r in range(world)]
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL * max(1, world / 64))
    here = [name for r in range(world) if (name := look(store, f"name {r}"))]
    missing = [f"rank {r}" for r in range(world) if not look(store, f"name {r}")]
    raise RankLostError(
        f"{' and '.join(missing) or 'rank 0'} did not come within {timeout:g} s (train.comm_timeout); here are "
        f"{', '.join(here)}: look into the output of those that are not, then start the same command again"
    )
