"""The plain reference: PIL, torchvision's transforms and a `torch.utils.data.DataLoader`."""

import gc
import traceback
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from kdav_fast.data.batch import Batch
from kdav_fast.data.check import decoding_defects, defects_error
from kdav_fast.data.epoch_loader import EpochLoader
from kdav_fast.data.folder import ImageFolder
from kdav_fast.data.preprocessing import CenterCrop, PaddedCrop, Preprocessing, RandomResizedCrop


class TorchvisionLoader(EpochLoader):
    """Decodes in worker processes, for clarity and not for speed.

    The order follows from (seed, epoch) and an image's augmentation from (seed, epoch, place), so epoch and
    step are the whole state and the number of workers changes nothing. See `EpochLoader` for arguments.
    """

    name = "torchvision"
    _loader: DataLoader | None = None

    def _rest_of_epoch(self, epoch: int, step: int) -> Iterator[Batch]:
        if self._loader is None:
            self._loader = self._build()
        batches = self._batches(epoch)[step:]
        self._loader.batch_sampler.batches = [
            [(epoch, place) for place in batch] for batch in batches.tolist()
        ]
        loaded = iter(self._loader)
        for position, batch in enumerate(batches, step):
            try:
                images, place = next(loaded)
            except Exception as error:
                # A worker's exception carries its traceback in its text; the user needs the file.
                defects = decoding_defects(self.folder, self._image_at[batch].tolist())
                if not defects:
                    raise
                # Frame and exception refer to each other and would keep the workers alive.
                traceback.clear_frames(error.__traceback__)
                raise defects_error(self.folder, defects) from None
            yield self._batch(images, place, position)

    def _batches(self, epoch: int) -> np.ndarray:
        """steps x B places in the order."""
        order = np.arange(len(self._image_at))
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        return self.shard.batches(order)

    def _build(self) -> DataLoader:
        # A forked worker would collect garbage that it inherits, and hang where that owns threads, as a
        # discarded DALI pipeline does: they run in the parent only.
        gc.collect()
        return DataLoader(
            _Images(self.folder, self._image_at, self.preprocessing, self.seed),
            batch_sampler=_Batches(),
            collate_fn=_collate,
            num_workers=self.workers,
            persistent_workers=True,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else every epoch would draw from the global random state
        )


class _Batches:
    """Batch sampler: (epoch, place) pairs, set before every epoch.

    It does not refer to the loader: in a reference cycle, the workers would outlive it.
    """

    batches: Sequence[list[tuple[int, int]]] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)


class _Images(Dataset):
    def __init__(
        self, folder: ImageFolder, image_at: np.ndarray, preprocessing: Preprocessing, seed: int
    ) -> None:
        self._folder = folder
        self._image_at = image_at
        self._transform = _transform(preprocessing)
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, place = key
        # torchvision draws from the worker's default generator. (`torch.manual_seed` would also queue a
        # seed for every CUDA device, each time.)
        seed = np.random.SeedSequence((self._seed, epoch, place)).generate_state(1, np.uint64)[0]
        torch.default_generator.manual_seed(int(seed))
        with Image.open(self._folder.root / self._folder.paths[self._image_at[place]]) as image:
            return self._transform(image.convert("RGB")), place


def _transform(preprocessing: Preprocessing) -> v2.Compose:
    size = preprocessing.size
    match preprocessing.crop:
        case RandomResizedCrop(area, aspect_ratio):
            crop = [v2.RandomResizedCrop(size, area, aspect_ratio)]
        case PaddedCrop(padding):
            crop = [v2.Resize(size), v2.CenterCrop(size), v2.RandomCrop(size, padding)]
        case CenterCrop(resize):
            crop = [v2.Resize(resize), v2.CenterCrop(size)]
    return v2.Compose(
        [
            *crop,
            *([v2.RandomHorizontalFlip()] if preprocessing.flip else []),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )


def _collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, places = zip(*samples, strict=True)
    return torch.stack(images).contiguous(memory_format=torch.channels_last), torch.tensor(places)
