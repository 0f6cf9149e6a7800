"""Several processes of one run on this machine, started without a launcher: quicker, and each can be watched."""

import atexit
import functools
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def start(program: Sequence[str], world: int, **environment: str) -> list[subprocess.Popen]:
    """Start `python PROGRAM...` as every rank of a group; output is collected."""
    return [
        subprocess.Popen(
            [sys.executable, *program],
            env=rank_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
        )
        for rank_environment in _environments(world, environment)
    ]


def _environments(world: int, changes: dict[str, str]) -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(REPOSITORY),
    }
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world))
    return [{**os.environ, **shared, **rank, **changes} for rank in ranks]


class Fork:
    """`python PROGRAM...`, forked from a process that has imported everything: importing takes 10 s of a core.

    Used like a `subprocess.Popen` of which both outputs are collected.
    """

    def __init__(self, program: Sequence[str], environment: dict[str, str], merge: bool = False) -> None:
        """`merge`: collect both outputs as one."""
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("out", "out" if merge else "err")]
        words = [str(word) for word in program]
        arguments = words, environment, [str(file) for file in self._files]
        self._process = _fork_server().Process(target=_become, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        out, err = (file.read_text() if file.exists() else "" for file in self._files)
        return out, err

    def output_so_far(self) -> str:
        """Of a process that still runs."""
        return self._files[0].read_text() if self._files[0].exists() else ""


@functools.cache
def _fork_server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kdav_fast.cli", "kdav_fast.train.loop", "kdav_fast.data.dali"])
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it when it is imported
    forkserver.ensure_running()
    del os.environ["DS_ACCELERATOR"]
    if before is not None:
        os.environ["DS_ACCELERATOR"] = before
    return context


def _become(program: list[str], environment: dict[str, str], outputs: list[str]) -> None:
    """Do in this process what `python PROGRAM...` does."""
    for stream, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    try:
        if program[0] == "-m":
            sys.argv = program[1:]
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = program
            sys.path.insert(0, str(Path(program[0]).parent))
            runpy.run_path(program[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def fork(program: Sequence[str], world: int, **environment: str) -> list[Fork]:
    """`start`, in processes that need not import anything."""
    return [Fork(program, each, merge=True) for each in _environments(world, environment)]


def outputs(processes: Sequence[subprocess.Popen | Fork], timeout: float = 500) -> list[str]:
    """What each printed, once all have ended; none is left running."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def run(program: Sequence[str], world: int, start=fork, **environment: str) -> list[str]:
    """Run a group to its end, which must be a good one."""
    processes = start(program, world, **environment)
    texts = outputs(processes)
    assert [process.returncode for process in processes] == [0] * world, "\n".join(texts)
    return texts
