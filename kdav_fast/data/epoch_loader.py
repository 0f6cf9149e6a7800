"""The bookkeeping that all loaders share: sharding, the position in an epoch, and its state."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from kdav_fast.data.batch import Batch
from kdav_fast.data.folder import ImageFolder
from kdav_fast.data.preprocessing import Preprocessing
from kdav_fast.data.sharding import Shard
from kdav_fast.errors import InputError


class EpochLoader(ABC):
    """A `Loader` whose subclass only has to produce the batches from a position on.

    Nothing is opened and no process or thread started before the first batch is asked for. One iterator at
    a time: a second one continues where the first was left.

    Args:
        folder: the split.
        preprocessing: from decoded image to network input.
        batch_size: images a batch of this rank.
        device: where the batches are delivered.
        workers: decoding threads or processes of this rank.
        shuffle: a new order of the whole split for every epoch, else always the order of `folder`.
        seed: of order and augmentation; the same on every rank.
        rank, world: this rank and how many there are.

    Raises:
        InputError: fewer images than ranks.
    """

    name: ClassVar[str]
    """Which implementation this is, as in `data.loader`."""

    def __init__(
        self,
        folder: ImageFolder,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        device: torch.device,
        workers: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.folder = folder
        self.preprocessing = preprocessing
        self.device = device
        self.workers = workers
        self.shuffle = shuffle
        self.seed = seed
        self.shard = Shard(len(folder), batch_size, rank, world)
        self._image_at = np.arange(len(folder))
        if shuffle:
            self._fill_up(batch_size * world)
        self.steps_per_epoch = self.shard.steps
        self.images_per_epoch = len(folder)
        self._labels = torch.from_numpy(folder.labels)
        self._epoch = 0
        self._step = 0

    def _fill_up(self, step_size: int) -> None:
        """Give the order as many places as whole steps need; the added ones repeat images from all over.

        They are shuffled in among the others and are not valid. Were the last batch padded with copies of one
        image instead, BatchNorm would take its statistics from that one.
        """
        images = len(self.folder)
        places = -(-images // step_size) * step_size
        repeated = np.arange(places - images) * images // max(1, places - images)
        self._image_at = np.concatenate([self._image_at, repeated])
        self.shard = replace(self.shard, images=places)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current epoch, then stand at the start of the next one.

        Raises:
            InputError: an image cannot be decoded; the message names it.
        """
        for batch in self._rest_of_epoch(self._epoch, self._step):
            # Before the batch is handed out: a state taken while it is in use counts it as seen.
            self._step += 1
            if self._step == self.steps_per_epoch:
                self._epoch, self._step = self._epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position, order and random state of this rank as JSON values; exact in the middle of an epoch."""
        return {**self._identity(), "epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            InputError: `state` is of another data set, split, batch size, rank, rank count, seed, loader or
                preprocessing; the position is then unchanged.
        """
        for key, here in self._identity().items():
            saved = state.get(key)
            if saved != here:
                raise InputError(
                    f"the saved position in the {self.folder.split} images is of {key} {saved!r}, but this run "
                    f"has {key} {here!r}; resume with the same {key} or start a new run"
                )
        self._epoch, self._step = state["epoch"], state["step"]

    @abstractmethod
    def _rest_of_epoch(self, epoch: int, step: int) -> Iterator[Batch]:
        """The batches of an epoch from `step` on."""

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a state to mean the same images in the same order."""
        return {
            "loader": self.name,
            "split": self.folder.split,
            "images": len(self.folder),
            "digest": self.folder.digest,
            "batch_size": self.shard.batch_size,
            "world": self.shard.world,
            "rank": self.shard.rank,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "preprocessing": repr(self.preprocessing),
        }

    def _batch(self, images: torch.Tensor, place: torch.Tensor, step: int) -> Batch:
        """Complete a batch from its images and their places in the order (on the CPU) and deliver it."""
        index = torch.from_numpy(self._image_at)[place]
        valid = torch.from_numpy(self.shard.valid(step)) & (place < len(self.folder))
        fields = (images, self._labels[index], valid, index)
        if self.device.type == "cuda":
            fields = (
                field if field.is_cuda else field.pin_memory().to(self.device, non_blocking=True)
                for field in fields
            )
        return Batch(*fields)
