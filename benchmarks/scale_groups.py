"""Groups of processes for `scale.py`: what they train on, how they start, and how they are told what to do."""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
from PIL import Image
from random_teacher import write_random_teacher

from kdav_fast.errors import InputError

HERE = Path(__file__).resolve().parents[1]
PROGRAM = "benchmarks/scale_process.py"


def write_data(folder: Path, classes: int, side: int) -> None:
    """One image of noise, the same for every class and split: for a set-up to see and a loader to decode."""
    first = folder / "noise.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(first)
    for split in ("train", "val"):
        for number in range(classes):
            place = folder / split / f"{number:04d}"
            place.mkdir(parents=True)
            (place / "0.jpg").hardlink_to(first)


def write_recipe(folder: Path, options: argparse.Namespace) -> None:
    """A recipe and its teacher's file.

    Raises:
        InputError: the teacher's name is unknown.
    """
    write_random_teacher(options.teacher, options.classes, folder / "teacher.safetensors")
    kdav = {"name": "kdav", "memory_length": options.memory_length, "posterior": options.posterior}
    recipe = {
        "run_dir": str(folder / "run"),
        "device": options.device,
        "data": {"name": "folder", "root": str(folder), "image_size": options.image_size},
        "teacher": {"name": options.teacher, "checkpoint": str(folder / "teacher.safetensors")},
        "model": {"name": options.student},
        "distiller": kdav,
        "optimizer": {"lr": 1e-3},
        "train": {"precision": options.precision, "comm_timeout": 120},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML


class Group:
    """N processes: one run together (`joined`), or a run each. As a context manager, it ends them.

    Args:
        tree: the checkout whose code they run.
    """

    def __init__(
        self, world: int, joined: bool, options: argparse.Namespace, folder: Path, tree: Path = HERE
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        cores = sorted(os.sched_getaffinity(0)) if options.device == "cpu" else []
        batch = options.batch_size * (world if joined else 1)
        self._stack = ExitStack()
        self._errors = []
        for _ in range(world):
            self._errors.append(self._stack.enter_context(tempfile.TemporaryFile("w+")))  # noqa: SIM115
        self._processes = []
        for rank in range(world):
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": options.device}
            place = (
                {"RANK": str(rank), "WORLD_SIZE": str(world)} if joined else {"RANK": "0", "WORLD_SIZE": "1"}
            )
            place |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
            shared |= {"OMP_NUM_THREADS": "1"} if cores else {}
            shared["PYTHONPATH"] = str(tree)
            core = str(cores[rank % len(cores)]) if cores else ""
            command = [sys.executable, str(tree / PROGRAM), core, str(folder / "recipe.yaml")]
            self._processes.append(
                subprocess.Popen(
                    [*command, f"train.batch_size={batch}"],
                    env={**os.environ, **shared, **place},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors[rank],
                    text=True,
                )
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        self._stack.close()

    def wait_until_ready(self) -> None:
        """Raises InputError if one of them cannot be set up."""
        self._answers()

    def cpu_seconds(self) -> float:
        """Of the processor, spent by all of them since they began."""
        times = [psutil.Process(process.pid).cpu_times() for process in self._processes]
        return sum(time.user + time.system for time in times)

    def ask(self, do: str, **arguments: Any) -> list[Any]:
        """Every process's answer, in order of rank; all begin at the same time."""
        line = json.dumps({"do": do, **arguments}) + "\n"
        for rank, process in enumerate(self._processes):
            try:
                process.stdin.write(line)
                process.stdin.flush()
            except BrokenPipeError:
                self._fail(rank)
        return self._answers()

    def _answers(self) -> list[Any]:
        answers = []
        for rank, process in enumerate(self._processes):
            line = next((line for line in process.stdout if line.startswith("@")), None)
            answers.append(json.loads(line[1:]) if line is not None else self._fail(rank))
        return answers

    def _fail(self, rank: int) -> None:
        self._errors[rank].seek(0)
        text = self._errors[rank].read().strip().splitlines() or ["it said nothing"]
        raise InputError(f"process {rank} of {len(self._processes)} ended: {text[-1]}")
