"""From image files to the batches of one rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kdav_fast.config import DataConfig
from kdav_fast.config.data import OF_GPU_DECODER
from kdav_fast.data.checks.scan import check_images
from kdav_fast.data.image_set import ImageSet
from kdav_fast.data.sources import Splits, open_evaluation_images, open_images
from kdav_fast.data.views import Order, Shuffled
from kdav_fast.errors import InputError

# torch takes seconds to load, and looking at images needs none: what does is imported where it is used.
if TYPE_CHECKING:
    import torch

    from kdav_fast.data.batch import Batch, Loader
    from kdav_fast.data.epoch_loader import EpochLoader
    from kdav_fast.data.preprocessing import Normalization, Preprocessing
    from kdav_fast.data.resident import ResidentImages

__all__ = [
    "Batch",
    "ImageSet",
    "Loader",
    "Loaders",
    "Splits",
    "build_evaluation_loader",
    "build_loaders",
    "check_images",
    "decode_images",
    "open_evaluation_images",
    "open_images",
]

_DECODE_BATCH = 256
_TRAINING = 1  # random stream of `Loaders.training`, beside that of `Loaders.train`


def __getattr__(name: str):
    if name in ("Batch", "Loader"):
        from kdav_fast.data import batch

        return getattr(batch, name)
    raise AttributeError(f"module 'kdav_fast.data' has no attribute {name!r}")


@dataclass(frozen=True)
class Loaders:
    """The loaders of one rank. Unless images are resident, none works before its first batch is asked for."""

    train: Loader
    """Shuffled and augmented, in the views of the run's order."""
    training: Callable[[], Loader]
    """Makes another loader of the same images in the same views, shuffled independently of `train`; augmented so too,
    unless images have fixed views."""
    evaluation: Loader
    """The evaluation split, in order."""
    measure: Callable[[], Loader]
    """Makes a loader of the training images as the evaluation sees them, in order: to measure statistics in
    one pass, after which its buffers are not held."""
    classes: tuple[str, ...]
    """Class names; a label is a position in it."""


def build_loaders(
    config: DataConfig,
    splits: Splits,
    *,
    batch_size: int,
    eval_batch_size: int,
    device: torch.device,
    rank: int,
    world: int,
    local_world: int,
    seed: int,
    normalization: Normalization,
    order: Order = Shuffled(),
) -> Loaders:
    """The loaders of one rank.

    Args:
        config: the data section.
        splits: what `open_images` found.
        batch_size: training images a batch of this rank, in each view.
        eval_batch_size: the same for `evaluation` and `measure`.
        device: where batches are delivered.
        rank, world: this rank and how many there are.
        local_world: ranks on this machine; they share its cores unless `config.workers` is set.
        seed: of the order and the augmentation; the same on every rank.
        normalization: mean and std to use; stands above `config.mean` and `config.std`.
        order: which training images are seen together. Other loaders have one view.

    Raises:
        InputError: the wanted way of loading cannot be used, or resident images do not fit or cannot be decoded.
    """
    import torch

    from kdav_fast.data.drawn_views import DrawnViews
    from kdav_fast.data.preprocessing import evaluation_preprocessing, training_preprocessing

    workers = config.workers or max(1, len(os.sched_getaffinity(0)) // local_world)
    make = partial(_loader_class(config, device), device=device, workers=workers)
    as_evaluated = evaluation_preprocessing(config, normalization)
    train = (splits.train, training_preprocessing(config, normalization))
    evaluation = (splits.evaluation, as_evaluated)
    if config.resident:
        # torchvision's worker processes cannot read a GPU's memory.
        where = device if config.loader == "dali" else torch.device("cpu")
        keep = partial(_keep, make, where=where, local_world=local_world, progress=rank == 0)
        train, evaluation = keep(*train), keep(*evaluation)
    shared = partial(make, rank=rank, world=world, on_reshard=config.on_reshard)
    # The same in all training loaders, whatever their seeds.
    views = DrawnViews(config.views, seed, train[1]) if config.views else None
    training = partial(shared, *train, batch_size=batch_size, shuffle=True, order=order, views=views)
    in_order = partial(shared, batch_size=eval_batch_size, shuffle=False, seed=seed)
    return Loaders(
        train=training(seed=seed),
        training=partial(training, seed=_derived_seed(seed, _TRAINING)),
        evaluation=in_order(*evaluation),
        measure=partial(in_order, splits.train, as_evaluated),
        classes=splits.train.classes,
    )


def build_evaluation_loader(
    config: DataConfig,
    images: ImageSet,
    *,
    batch_size: int,
    device: torch.device,
    normalization: Normalization,
) -> Loader:
    """One process's loader of an evaluation split, as in `build_loaders`. It passes once: nothing is resident."""
    from kdav_fast.data.preprocessing import evaluation_preprocessing

    workers = config.workers or len(os.sched_getaffinity(0))
    preprocessing = evaluation_preprocessing(config, normalization)
    loader_class = _loader_class(config, device)
    return loader_class(
        images, preprocessing, batch_size=batch_size, device=device, workers=workers, shuffle=False
    )


def decode_images(config: DataConfig, images: ImageSet, device: torch.device) -> ResidentImages:
    """A split in the memory of a device, as the evaluation sees it: decoded once, before normalisation.

    Raises:
        InputError: as in `build_loaders`.
    """
    from kdav_fast.data.preprocessing import evaluation_pixels
    from kdav_fast.data.resident import decode_once

    workers = config.workers or len(os.sched_getaffinity(0))
    make = partial(_loader_class(config, device), device=device, workers=workers)
    decoder = make(images, evaluation_pixels(config), batch_size=_DECODE_BATCH, shuffle=False)
    return decode_once(decoder, device, local_world=1, progress=True)


def _keep(
    make: Callable[..., EpochLoader],
    images: ImageSet,
    preprocessing: Preprocessing,
    *,
    where: torch.device,
    local_world: int,
    progress: bool,
) -> tuple[ImageSet, Preprocessing]:
    """A split in memory, and what remains to be done to its pixels."""
    from kdav_fast.data.preprocessing import pixel_preprocessing, resident_preprocessing
    from kdav_fast.data.resident import decode_once

    decoder = make(images, pixel_preprocessing(preprocessing), batch_size=_DECODE_BATCH, shuffle=False)
    return decode_once(decoder, where, local_world, progress), resident_preprocessing(preprocessing)


def _derived_seed(seed: int, stream: int) -> int:
    return int(np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64)[0])


def _loader_class(config: DataConfig, device: torch.device) -> type[EpochLoader] | partial[EpochLoader]:
    if config.decode == "gpu" and device.type != "cuda":
        raise InputError(
            f"data.decode is 'gpu' but the device is '{device.type}'; set data.decode=cpu or device=cuda"
        )
    decode = "cpu"
    if config.loader == "dali" and device.type == "cuda" and config.decode != "cpu":
        decode = "gpu"
    for key in OF_GPU_DECODER:
        if (given := getattr(config, key)) is not None and decode == "cpu":
            raise InputError(
                f"data.{key} is {given} but images are decoded on the CPU; set data.{key}=null, or decode on a GPU "
                "(device=cuda, data.loader=dali, data.decode=gpu)"
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
    return partial(
        DaliLoader,
        decode=decode,
        hw_decoder_load=config.hw_decoder_load,
        fancy_upsampling=config.fancy_upsampling is not False,
    )
