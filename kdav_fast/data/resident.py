"""A split decoded once and kept in memory, so that training is not bound by decoding."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch

from kdav_fast.data.epoch_loader import EpochLoader
from kdav_fast.data.image_set import ImageSet, PixelImages
from kdav_fast.errors import InputError
from kdav_fast.runtime.progress_bar import ProgressBar

_GIB = 2**30


@dataclass(frozen=True, eq=False)
class ResidentImages(PixelImages):
    """The pixels of another set's images."""

    source: ImageSet

    def name(self, position: int) -> str:
        return self.source.name(position)

    @property
    def digest(self) -> str:
        return f"{self.source.digest}-{self.pixels.shape[1]}"

    def select(self, positions: np.ndarray) -> "ResidentImages":
        return replace(super().select(positions), source=self.source.select(positions))


def decode_once(
    loader: EpochLoader, device: torch.device, local_world: int, progress: bool
) -> ResidentImages:
    """All images of a split as pixels on `device`.

    Args:
        loader: of the split, in order, whose preprocessing gives bytes (dtype uint8).
        device: where the pixels are kept, by every process.
        local_world: processes on this machine, each of which needs the memory.
        progress: show a bar on stderr.

    Raises:
        InputError: they do not fit, or an image cannot be decoded.
    """
    images, size = loader.images, loader.preprocessing.size
    _require_memory(images, size, device, local_world)
    pixels = torch.empty(len(images), size, size, 3, dtype=torch.uint8, device=device)
    for batch in ProgressBar(
        loader, f"decode {images.split}", loader.batches_per_epoch, disable=None if progress else True
    ):
        pixels[batch.index.to(device)] = batch.images.permute(0, 2, 3, 1).to(device)
    return ResidentImages(images.root, images.split, images.classes, images.labels, pixels, images)


def picked_rows(pixels: torch.Tensor, batches: Iterable[np.ndarray]) -> Iterator[torch.Tensor | np.ndarray]:
    """The pixels of every batch's images, B x H x W x 3, where they are kept; the host never waits for the device."""
    if not pixels.is_cuda:
        rows = pixels.numpy()  # torch takes ten times as long to pick rows of bytes on a CPU
        return (rows[batch] for batch in batches)
    # Out of pinned memory the device copies by itself; for a copy of other memory the host waits.
    indices = (torch.from_numpy(batch).pin_memory() for batch in batches)
    return (pixels[index.to(pixels.device, non_blocking=True)] for index in indices)


def _require_memory(images: ImageSet, size: int, device: torch.device, local_world: int) -> None:
    needed = len(images) * size * size * 3
    if device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], "of GPU memory"
    else:
        free, where = psutil.virtual_memory().available // local_world, "of memory a process"
    if needed > free:
        raise InputError(
            f"data.resident needs {needed / _GIB:.1f} GiB for the {len(images)} {images.split} images at "
            f"{size} x {size}, but {free / _GIB:.1f} GiB {where} are free; use data.resident=false, or lower "
            "data.image_size or data.train_subset"
        )
