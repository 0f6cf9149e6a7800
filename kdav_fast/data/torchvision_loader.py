"""The plain reference: Pillow, torchvision's transforms and a `torch.utils.data.DataLoader`."""

import gc
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from kdav_fast.data.checks.scan import decoding_defects, defects_error
from kdav_fast.data.epoch_loader import EpochLoader
from kdav_fast.data.formats import rgb
from kdav_fast.data.image_set import EncodedImages, PixelImages
from kdav_fast.data.order import EpochOrder
from kdav_fast.data.preprocessing import Preprocessing
from kdav_fast.data.torchvision_transform import transform
from kdav_fast.data.torchvision_views import show
from kdav_fast.data.view_parameters import ViewSource


class TorchvisionLoader(EpochLoader):
    """Decodes in worker processes, for clarity and not for speed.

    An image's augmentation follows from (seed, epoch, place, view), or from its fixed view, so the position in the
    epoch is the whole state and the number of workers changes nothing. See `EpochLoader` for arguments.
    """

    name = "torchvision"
    _loader: DataLoader | None = None

    def _rest_of_epoch(self, epoch: int, first: int) -> Iterator[torch.Tensor]:
        if self._loader is None:
            self._loader = self._build()
        places, positions = self._epochs.places(epoch)[first:], self._epochs.images_to_load(epoch)[first:]
        self._loader.batch_sampler.batches = (
            _as_views(self._epochs, epoch, positions)
            if self.views
            else _as_rows(self._epochs.seed, epoch, places, positions)
        )
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
            _Images(self.images, self.preprocessing, self.views),
            batch_sampler=_Batches(),
            collate_fn=_Collate(self.preprocessing.channels_last),
            num_workers=self.workers,
            persistent_workers=True,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else every epoch would draw from the global random state
        )


_Row = tuple[int, tuple[int, ...] | int]
"""An image's position in the split, and what seeds its augmentation, or which of its fixed views it is."""


def _as_rows(seed: int, epoch: int, places: np.ndarray, positions: np.ndarray) -> Iterator[list[_Row]]:
    """The rows of every batch: batches x B places, batches x V*B positions."""
    for batch, shown in zip(places, positions, strict=True):
        # The first view's augmentation is that of an order with one view.
        seeds = [(seed, epoch, place) for place in batch.tolist()]
        for view in range(1, len(shown) // len(batch)):
            seeds += [(seed, epoch, place, view) for place in batch.tolist()]
        yield list(zip(shown.tolist(), seeds, strict=True))


def _as_views(epochs: EpochOrder, epoch: int, positions: np.ndarray) -> Iterator[list[_Row]]:
    """The rows of every batch where images have fixed views."""
    for batch in positions:
        yield list(zip(batch.tolist(), epochs.views_to_show(epoch, batch).tolist(), strict=True))


class _Batches:
    """Batch sampler: the rows of every batch, set before every epoch.

    It does not refer to the loader: in a reference cycle, the workers would outlive it.
    """

    batches: Iterable[list[_Row]] = ()

    def __iter__(self) -> Iterator[list[_Row]]:
        return iter(self.batches)


class _Images(Dataset):
    def __init__(
        self, images: EncodedImages | PixelImages, preprocessing: Preprocessing, views: ViewSource | None
    ) -> None:
        self._images, self._preprocessing, self._views = images, preprocessing, views
        self._transform = transform(preprocessing)

    def __getitem__(self, row: _Row) -> torch.Tensor:
        position, _ = row
        if isinstance(self._images, PixelImages):
            return self._augmented(Image.fromarray(self._images.pixels[position].numpy()), row)
        with self._images.open(position) as file, Image.open(file) as image:
            return self._augmented(rgb(image), row)

    def _augmented(self, image: Image.Image, row: _Row) -> torch.Tensor:
        position, drawn_from = row
        if self._views is not None:
            sizes = np.array([[image.height, image.width]])
            parameters = self._views.parameters(np.array([position]), np.array([drawn_from]), sizes)
            return show(image, self._preprocessing, parameters)
        # torchvision draws from the worker's default generator. (`torch.manual_seed` would also queue a
        # seed for every CUDA device, each time.)
        seed = np.random.SeedSequence(drawn_from).generate_state(1, np.uint64)[0]
        torch.default_generator.manual_seed(int(seed))
        return self._transform(image)


class _Collate:
    def __init__(self, channels_last: bool) -> None:
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(images).contiguous(memory_format=self._format)
