"""From image files to the batches of one rank."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from kdav_fast.config import DataConfig
from kdav_fast.data.batch import Batch, Loader
from kdav_fast.data.check import check_images
from kdav_fast.data.digits import prepare_digits
from kdav_fast.data.epoch_loader import EpochLoader
from kdav_fast.data.folder import ImageFolder, open_evaluation_folder, open_folder, take_subset
from kdav_fast.data.preprocessing import Normalization, evaluation_preprocessing, training_preprocessing
from kdav_fast.errors import InputError

__all__ = [
    "Batch",
    "DataSets",
    "ImageFolder",
    "Images",
    "Loader",
    "build_evaluation_loader",
    "build_loaders",
    "check_images",
    "open_evaluation_images",
    "open_images",
]


class Images(NamedTuple):
    """The files of a data set, indexed but not opened."""

    train: ImageFolder
    """After `data.train_subset`."""
    evaluation: ImageFolder
    """`val/`, or `test/` where there is no `val/`."""


@dataclass(frozen=True)
class DataSets:
    """The loaders of one rank. None of them works before its first batch is asked for."""

    train: Loader
    """Shuffled and augmented."""
    evaluation: Loader
    """`val/` or `test/`, in order."""
    measure: Callable[[], Loader]
    """Makes a loader of the training images as the evaluation sees them, in order: to measure statistics in
    one pass, after which its buffers are not held."""
    classes: tuple[str, ...]
    """Class names; a target is a position in it."""


def open_images(config: DataConfig, seed: int) -> Images:
    """Index the data set of a config. The files are listed, not checked: see `check_images`.

    Args:
        config: the data section.
        seed: of the subset.

    Raises:
        InputError: the folders are not as they must be, or too small for the subset.
    """
    train, evaluation = open_folder(_root(config))
    if config.train_subset is not None:
        train = take_subset(train, config.train_subset, seed)
    return Images(train, evaluation)


def open_evaluation_images(config: DataConfig) -> ImageFolder:
    """Index only the evaluation split; there need be no training images.

    Raises:
        InputError: the folder is not as it must be.
    """
    return open_evaluation_folder(_root(config))


def build_loaders(
    config: DataConfig,
    images: Images,
    *,
    batch_size: int,
    eval_batch_size: int,
    device: torch.device,
    rank: int,
    world: int,
    local_world: int,
    seed: int,
    normalization: Normalization,
) -> DataSets:
    """The loaders of one rank.

    Args:
        config: the data section.
        images: what `open_images` found.
        batch_size: training images a batch of this rank.
        eval_batch_size: the same for `evaluation` and `measure`.
        device: where batches are delivered.
        rank, world: this rank and how many there are.
        local_world: ranks on this machine; they share its cores unless `config.workers` is set.
        seed: of the order and the augmentation; the same on every rank.
        normalization: mean and std to use; stands above `config.mean` and `config.std`.

    Raises:
        InputError: the wanted way of loading cannot be used, or there are fewer images than ranks.
    """
    workers = config.workers or max(1, len(os.sched_getaffinity(0)) // local_world)
    place = {"device": device, "workers": workers, "seed": seed, "rank": rank, "world": world}
    loader = partial(_loader_class(config, device), **place)
    train_view = training_preprocessing(config, normalization)
    evaluation_view = evaluation_preprocessing(config, normalization)
    return DataSets(
        train=loader(images.train, train_view, batch_size=batch_size, shuffle=True),
        evaluation=loader(images.evaluation, evaluation_view, batch_size=eval_batch_size, shuffle=False),
        measure=partial(loader, images.train, evaluation_view, batch_size=eval_batch_size, shuffle=False),
        classes=images.train.classes,
    )


def build_evaluation_loader(
    config: DataConfig,
    images: ImageFolder,
    *,
    batch_size: int,
    device: torch.device,
    normalization: Normalization,
) -> Loader:
    """One process's loader of an evaluation split, as in `build_loaders`."""
    workers = config.workers or len(os.sched_getaffinity(0))
    view = evaluation_preprocessing(config, normalization)
    loader_class = _loader_class(config, device)
    return loader_class(images, view, batch_size=batch_size, device=device, workers=workers, shuffle=False)


def _root(config: DataConfig) -> Path:
    return prepare_digits(config.root) if config.name == "digits" else config.root


def _loader_class(config: DataConfig, device: torch.device) -> "type[EpochLoader] | partial[EpochLoader]":
    if config.decode == "gpu" and device.type != "cuda":
        raise InputError(
            f"data.decode is 'gpu' but the device is '{device.type}'; set data.decode=cpu or device=cuda"
        )
    if config.loader == "torchvision":
        if config.decode == "gpu":
            raise InputError(
                "data.decode is 'gpu' but data.loader=torchvision decodes on the CPU; set data.loader=dali"
            )
        from kdav_fast.data.torchvision_loader import TorchvisionLoader

        return TorchvisionLoader
    try:
        from kdav_fast.data.dali import DaliLoader
    except ImportError as error:
        raise InputError(
            f"data.loader is 'dali' but the package nvidia-dali-cuda130 cannot be imported ({error}); install it "
            "or set data.loader=torchvision"
        ) from None
    on_gpu = device.type == "cuda" and config.decode != "cpu"
    return partial(DaliLoader, decode="gpu" if on_gpu else "cpu")
