"""What several test modules need: small runs on the digits, and where GPU tests run."""

import copy
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from kdav_fast.config import Config, parse_config

# Tests run side by side, and networks as small as theirs gain nothing from a second thread.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

if not torch.cuda.is_available():
    # Triton's kernels are interpreted. It reads the variable when it is imported, which many test modules do.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What is imported stays: no later collection of garbage looks at it again, of which there are many."""
    gc.collect()
    gc.freeze()


SMALL_RUN: dict[str, Any] = {
    "device": "cpu",
    "data": {
        "name": "digits",
        "image_size": 8,
        "crop": "padded",
        "crop_padding": 1,
        "flip": False,
        "train_subset": 240,
        "workers": 1,
    },
    "model": {"name": "cifar:resnet8", "width": 0.25},
    "train": {"epochs": 3, "batch_size": 32, "log_every": 3, "evaluate_every": 1, "save_every": 1},
}
"""8 steps an epoch, the last one half padding; seconds on one core."""


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `changes` put in."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


@pytest.fixture(scope="session")
def small_config():
    """Builds the config of a small run: `small_config(run_dir, section={...})`."""

    def build(run_dir: Path, **changes: Any) -> Config:
        return parse_config(merged(SMALL_RUN, {"run_dir": str(run_dir), **changes}))

    return build


@pytest.fixture
def fresh_compiler():
    """torch.compile keeps what it made of a method for all objects of the class, so from test to test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Makes a folder that all workers of this test run share: `made_once(name, make)` returns it.

    The first to ask calls `make(folder)`; the others wait. Nobody may write to it later.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # each worker's folder is in the run's

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, finished = shared / name, shared / f"{name}.finished"
        with FileLock(shared / f"{name}.lock"):
            if not finished.exists():
                make(folder)
                finished.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def teacher_run(small_config, made_once) -> Path:
    """A finished run of a small teacher on the digits."""

    def train(run_dir: Path) -> None:
        from kdav_fast.train.loop import run_training

        run_training(small_config(run_dir, model={"width": 1.0}, train={"epochs": 4}))

    return made_once("teacher", train)
