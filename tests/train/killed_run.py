"""A program: launches attempts at a run, in which one rank gets a signal at a chosen moment.

It reads a JSON object a line and answers each with one: see `attempt`. Its own process imports everything and the ranks
are forked from it, since importing takes longer than the runs of the tests.
"""

import json
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from kdav_fast.cli import main
from kdav_fast.runtime.stopping import STOPPED
from kdav_fast.student.heads import EmbeddingHead
from kdav_fast.tracking.metrics_log import MetricsLog
from kdav_fast.train import loop
from kdav_fast.train.engine.engine import Engine
from kdav_fast.train.folder import results

GRACE = 1.0
"""Seconds that the others have to end by themselves after a rank has died, as a launcher gives them."""
WATCHDOG = 120.0
"""Seconds after which ranks that hang are killed."""


class Strike(NamedTuple):
    """A signal for one rank, at the `nth` of its moments whose names begin with `moment`."""

    rank: int
    moment: str
    nth: int
    signal: int = signal.SIGKILL


def attempt(config: str, world: int, strike: list | None = None) -> dict[str, Any]:
    """Start a run or continue it; returns each rank's exit code, and what all printed.

    Where a rank has died, the others are killed after a while. A signal other than SIGKILL is sent from here, while the
    rank stands still at its moment.
    """
    strike = strike and Strike(*strike)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile("w+") as output:
        ranks = {}
        for rank in range(world):
            process = os.fork()
            if process == 0:
                os.dup2(output.fileno(), sys.stdout.fileno())
                os.dup2(output.fileno(), sys.stderr.fileno())
                group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in group.items()}
                run_rank(config, rank, strike)
            ranks[process] = rank
        codes = _wait(ranks, strike)
        output.seek(0)
        return {"codes": [codes[rank] for rank in range(world)], "output": output.read()}


def _wait(ranks: dict[int, int], strike: Strike | None) -> dict[int, int]:
    codes, deadline = {}, time.monotonic() + WATCHDOG
    while len(codes) < len(ranks):
        process, status = os.waitpid(-1, os.WUNTRACED | os.WNOHANG)
        if process == 0:
            if time.monotonic() > deadline:
                for late in [process for process, rank in ranks.items() if rank not in codes]:
                    os.kill(late, signal.SIGKILL)
            time.sleep(0.01)
        elif os.WIFSTOPPED(status):
            os.kill(process, strike.signal)
            os.kill(process, signal.SIGCONT)
        else:
            code = codes[ranks[process]] = os.waitstatus_to_exitcode(status)
            if code not in (0, STOPPED):
                deadline = min(deadline, time.monotonic() + GRACE)
    return codes


def run_rank(config: str, rank: int, strike: Strike | None) -> None:
    """What one process does, to its end; it prints how many moments there were."""
    passed, matching = count(1), count(1)

    def pass_moment(name: str, half: Callable[[], None]) -> None:
        next(passed)
        if not (strike and strike.rank == rank and name.startswith(strike.moment)):
            return
        if next(matching) == strike.nth:
            if strike.signal != signal.SIGKILL:
                os.kill(os.getpid(), signal.SIGSTOP)
                return
            half()
            print(f"killed at {name}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    watch_moments(pass_moment)
    code = main(["distill", config])
    print(f"rank {rank} passed {next(passed) - 1} moments", flush=True)
    sys.exit(code)


def watch_moments(pass_moment: Callable[[str, Callable[[], None]], None]) -> None:
    """Call `pass_moment` before each call of what a run does, with a name and with a way to do half of it."""

    def watch(owner: Any, function: str, name: Callable[..., str], half: Callable = lambda *_: None) -> None:
        original = getattr(owner, function)

        def watched(*arguments, **options):
            pass_moment(name(*arguments), lambda: half(*arguments))
            return original(*arguments, **options)

        setattr(owner, function, watched)

    for owner, function in (
        (EmbeddingHead, "observe"),
        (Engine, "backward"),
        (Engine, "step"),
        (loop, "evaluate_student"),
        (results, "write_report"),
    ):
        watch(owner, function, lambda *_, name=function: name)
    for function in ("mkdir", "rename", "replace"):
        watch(Path, function, lambda path, *_, name=function: f"{name} {path.name}")
    watch(shutil, "rmtree", lambda path, *_: f"rmtree {path.name}", _remove_one_file)
    watch(os, "fsync", lambda file: f"fsync {Path(f'/proc/self/fd/{file}').readlink().name}", _halve)
    watch(MetricsLog, "write", lambda *_: "log", _write_half_a_line)


def _halve(file: int) -> None:
    status = os.fstat(file)
    if stat.S_ISREG(status.st_mode):
        os.ftruncate(file, status.st_size // 2)


def _remove_one_file(folder: Path, *_: Any) -> None:
    for file in sorted(folder.glob("*"))[:1]:
        file.unlink()


def _write_half_a_line(log: MetricsLog, step: int, values: dict) -> None:
    log._file.write(json.dumps({"step": step, **values})[:20])
    log._file.flush()


if __name__ == "__main__":
    import deepspeed  # noqa: F401 (for the ranks)

    import kdav_fast.data.dali  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(attempt(**json.loads(line))), flush=True)
