"""Several processes of one run on this machine, started without a launcher: quicker, and each can be watched."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def start(program: Sequence[str], world: int, **environment: str) -> list[subprocess.Popen]:
    """Start `python PROGRAM...` as every rank of a group; output is collected."""
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
    return [
        subprocess.Popen(
            [sys.executable, *program],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
        )
        for rank in range(world)
    ]


def outputs(processes: Sequence[subprocess.Popen], timeout: float = 500) -> list[str]:
    """What each printed, once all have ended; none is left running."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def run(program: Sequence[str], world: int, **environment: str) -> list[str]:
    """Run a group to its end, which must be a good one."""
    processes = start(program, world, **environment)
    texts = outputs(processes)
    assert [process.returncode for process in processes] == [0] * world, "\n".join(texts)
    return texts
