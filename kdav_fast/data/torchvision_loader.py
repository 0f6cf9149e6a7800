"""The plain reference: Pillow, torchvision's transforms and a `torch.utils.data.DataLoader`."""

import gc
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from kdav_fast.data.checks.scan import decoding_defects, defects_error
from kdav_fast.data.epoch_loader import EpochLoader
from kdav_fast.data.formats import rgb
from kdav_fast.data.image_set import EncodedImages, PixelImages
from kdav_fast.data.preprocessing import (
    CenterCrop,
    ColorJitter,
    PaddedCrop,
    Preprocessing,
    RandAugment,
    RandomResizedCrop,
    TrivialAugment,
)


class TorchvisionLoader(EpochLoader):
    """Decodes in worker processes, for clarity and not for speed.

    An image's augmentation follows from (seed, epoch, place, view), so the position in the epoch is the whole state
    and the number of workers changes nothing. See `EpochLoader` for arguments.
    """

    name = "torchvision"
    _loader: DataLoader | None = None

    def _rest_of_epoch(self, epoch: int, first: int) -> Iterator[torch.Tensor]:
        if self._loader is None:
            self._loader = self._build()
        places, positions = self._epochs.places(epoch)[first:], self._epochs.images_to_load(epoch)[first:]
        self._loader.batch_sampler.batches = _as_rows(self._epochs.seed, epoch, places, positions)
        loaded = iter(self._loader)
        for batch in positions:
            try:
                images = next(loaded)
            except Exception as error:
                # A worker's exception carries its traceback in its text; the user needs the file.
                defects = decoding_defects(self.images, batch.tolist())
                if not defects:
                    raise
                # Frame and exception refer to each other and would keep the workers alive.
                traceback.clear_frames(error.__traceback__)
                raise defects_error(self.images, defects) from None
            yield images

    def _restore(self, state: dict[str, Any] | None) -> None:
        """The position in the epoch is the whole state."""

    def _build(self) -> DataLoader:
        # A forked worker would collect garbage that it inherits, and hang where that owns threads, as a
        # discarded DALI pipeline does: they run in the parent only.
        gc.collect()
        return DataLoader(
            _Images(self.images, self.preprocessing),
            batch_sampler=_Batches(),
            collate_fn=_Collate(self.preprocessing.channels_last),
            num_workers=self.workers,
            persistent_workers=True,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else every epoch would draw from the global random state
        )


_Row = tuple[int, tuple[int, ...]]
"""An image's position in the split, and what seeds its augmentation."""


def _as_rows(seed: int, epoch: int, places: np.ndarray, positions: np.ndarray) -> Iterator[list[_Row]]:
    """The rows of every batch: batches x B places, batches x V*B positions."""
    for batch, shown in zip(places, positions, strict=True):
        # The first view's augmentation is that of an order with one view.
        seeds = [(seed, epoch, place) for place in batch.tolist()]
        for view in range(1, len(shown) // len(batch)):
            seeds += [(seed, epoch, place, view) for place in batch.tolist()]
        yield list(zip(shown.tolist(), seeds, strict=True))


class _Batches:
    """Batch sampler: the rows of every batch, set before every epoch.

    It does not refer to the loader: in a reference cycle, the workers would outlive it.
    """

    batches: Iterable[list[_Row]] = ()

    def __iter__(self) -> Iterator[list[_Row]]:
        return iter(self.batches)


class _Images(Dataset):
    def __init__(self, images: EncodedImages | PixelImages, preprocessing: Preprocessing) -> None:
        self._images = images
        self._transform = transform(preprocessing)

    def __getitem__(self, row: _Row) -> torch.Tensor:
        position, entropy = row
        # torchvision draws from the worker's default generator. (`torch.manual_seed` would also queue a
        # seed for every CUDA device, each time.)
        seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
        torch.default_generator.manual_seed(int(seed))
        if isinstance(self._images, PixelImages):
            return self._transform(Image.fromarray(self._images.pixels[position].numpy()))
        with self._images.open(position) as file, Image.open(file) as image:
            return self._transform(rgb(image))


def transform(preprocessing: Preprocessing) -> v2.Compose:
    """From a PIL image to the network's input."""
    steps = [
        *_crop(preprocessing),
        *_augment(preprocessing.augment),
        *_jitter(preprocessing.jitter),
        *([v2.RandomHorizontalFlip()] if preprocessing.flip else []),
        v2.PILToTensor(),
    ]
    if preprocessing.dtype != torch.uint8:
        steps += [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(preprocessing.mean, preprocessing.std),
            v2.ToDtype(preprocessing.dtype),
        ]
    return v2.Compose(steps)


def _crop(preprocessing: Preprocessing) -> list[v2.Transform]:
    size = preprocessing.size
    match preprocessing.crop:
        case RandomResizedCrop(area, aspect_ratio):
            return [v2.RandomResizedCrop(size, area, aspect_ratio)]
        case PaddedCrop(padding):
            return [v2.Resize(size), v2.CenterCrop(size), v2.RandomCrop(size, padding)]
        case CenterCrop(resize):
            return [v2.Resize(resize), v2.CenterCrop(size)]


def _augment(augment: RandAugment | TrivialAugment | None) -> list[v2.Transform]:
    match augment:
        case RandAugment(operations, magnitude):
            return [v2.RandAugment(operations, magnitude)]
        case TrivialAugment():
            return [v2.TrivialAugmentWide()]
        case None:
            return []


def _jitter(jitter: ColorJitter | None) -> list[v2.Transform]:
    if jitter is None:
        return []
    return [v2.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)]


class _Collate:
    def __init__(self, channels_last: bool) -> None:
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(images).contiguous(memory_format=self._format)
