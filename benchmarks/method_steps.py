"""Training steps of any method as its run takes them, on one batch in memory: what benchmarks/method_costs.py measures.

Images that nobody reads stand for a data set of any size: methods remember something of each, or draw among them.
"""

import gc
import time
from collections.abc import Callable
from itertools import count, repeat
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from random_teacher import write_random_teacher
from timing import once, peak_extra_bytes
from torch import Tensor

from kdav_fast.config import Config, parse_config
from kdav_fast.data import Batch, Splits
from kdav_fast.data.image_set import PixelImages
from kdav_fast.runtime.processes import Cluster
from kdav_fast.train import setup
from kdav_fast.train.run import Run
from kdav_fast.train.step import take_step

WARM_UP = 3
"""Steps in which convolutions are chosen and memory is allocated."""


class MethodSteps:
    """A method's run at work: the teacher's answers, the loss, the optimizer's step, and what the method does besides.

    The steps are of the middle of a run, where warm-ups are over. What comes before distillation is left out: no step
    waits for it, and none takes longer for what it would find.

    Args:
        config: of the run.
        data: of `make_data`.
        cluster: this process.
    """

    def __init__(self, config: Config, data: setup.RunData, cluster: Cluster) -> None:
        self._device = cluster.device
        before = held_bytes(self._device)
        with patch.object(setup, "find_data", lambda *_: data):
            self._run = setup.set_up(config, cluster)
        self._run.start_engine()
        self._run.trainee.train()
        if self._run.first_answers is not None:
            self._run.first_answers.see = lambda *_: None  # as in a run, once it has been told about them
        self._batches = repeat(make_batch(self._run, data.splits.train.labels))
        self._numbers = count(self._run.steps // 2)
        for _ in range(WARM_UP):
            self.step()
        self.held_bytes = held_bytes(self._device) - before
        """What the run holds between steps, with its batch."""
        self.step_bytes = peak_extra_bytes(self.step, self._device)
        """What a step holds at most beyond that."""

    @property
    def views(self) -> int:
        return self._run.distiller.order.count

    def step(self) -> Tensor:
        """Whether it was taken, as `take_step` says."""
        return take_step(self._run, self._batches, next(self._numbers))[0]

    def take_turn(self, steps: int) -> float:
        """Seconds a step: between events of a GPU, of processor time on a CPU, where others may be at work too.

        Raises:
            FloatingPointError: the loss or the gradient of a step was not finite.
        """
        taken: list[Tensor] = []

        def make() -> Callable[[], None]:
            if self._device.type == "cuda":
                self.step()  # the device is at work when its clock starts, as within a run
            return lambda: taken.extend(self.step() for _ in range(steps))

        began = time.process_time()
        elapsed = once(make, self._device)
        seconds = elapsed if self._device.type == "cuda" else time.process_time() - began
        if not torch.stack(taken).all():
            raise FloatingPointError("loss or gradient not finite: its steps cannot be compared")
        return seconds / steps


def make_config(folder: Path, settings: dict[str, Any], method: dict[str, Any]) -> Config:
    """Of a run between two networks; its weights are written by `write_teacher`.

    Args:
        folder: of the teacher's file.
        settings: device, sizes and networks.
        method: the distiller section.

    Raises:
        InputError: what the package does not know, or does not go together.
    """
    raw = {
        "run_dir": str(folder / "run"),
        "device": settings["device"],
        "data": {"name": "folder", "root": str(folder), "image_size": settings["image_size"]},
        "teacher": {"name": settings["teacher"], "checkpoint": str(_teacher_file(folder))},
        "model": {"name": settings["student"]},
        "distiller": method,
        "optimizer": {"name": "sgd", "lr": 1e-3},  # weights stay near where they are, whatever the method
        "schedule": {"name": "constant"},
        "train": {
            "epochs": 100,
            "batch_size": settings["batch_size"],
            "precision": settings["precision"],
        },
    }
    raw["data"] |= {"crop": "padded", "loader": "torchvision"}  # of which nothing is asked
    return parse_config(raw)


def write_teacher(folder: Path, settings: dict[str, Any]) -> None:
    """With random weights; raises InputError for a network that is not known."""
    write_random_teacher(settings["teacher"], settings["classes"], _teacher_file(folder))


def _teacher_file(folder: Path) -> Path:
    return folder / "teacher.safetensors"


def make_data(images: int, classes: int) -> setup.RunData:
    """As many training images, all of one byte, spread over the classes."""
    pixels = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(images, 1, 1, 3)
    names = tuple(f"class {number}" for number in range(classes))
    train = PixelImages(Path(), "train", names, np.arange(images) % classes, pixels)
    evaluation = PixelImages(Path(), "val", names, np.arange(classes), pixels[:classes])
    return setup.RunData(Splits(train, evaluation), {})


def make_batch(run: Run, labels: np.ndarray) -> Batch:
    """Noise in the views of the run's method; the images are drawn from all over the data set."""
    config, device, views = run.config, run.cluster.device, run.distiller.order.count
    size, side = config.train.batch_size, config.data.image_size
    index = torch.from_numpy(np.random.default_rng(0).permutation(len(labels))[:size])
    images = torch.randn(views * size, 3, side, side, generator=torch.Generator().manual_seed(0))
    layout = torch.channels_last if config.data.layout == "channels_last" else torch.contiguous_format
    return Batch(
        images.to(device, memory_format=layout),
        torch.from_numpy(labels)[index].to(device),
        torch.ones(size, dtype=torch.bool, device=device),
        index.to(device),
        views=views,
    )


def held_bytes(device: torch.device) -> int:
    """Bytes of all tensors that there are on the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    tensors = (each for each in gc.get_objects() if issubclass(type(each), Tensor))
    storages = (
        each.untyped_storage() for each in tensors if each.device.type == "cpu" and not each.is_sparse
    )
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
