"""The bookkeeping that all loaders share: order, sharding, the position in an epoch, and its state."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from kdav_fast.data.batch import Batch
from kdav_fast.data.image_set import ImageSet
from kdav_fast.data.order import EpochOrder
from kdav_fast.data.preprocessing import Preprocessing
from kdav_fast.data.rotation import rotations
from kdav_fast.data.view_parameters import ViewSource
from kdav_fast.data.views import Order, Rotations, Shuffled
from kdav_fast.errors import InputError

_SHARDING = ("batch_size", "world", "rank")


class EpochLoader(ABC):
    """A `Loader` whose subclass only has to produce the batches from a position on.

    The order of an epoch follows from (seed, epoch) alone: every loader, whatever its kind and however many
    ranks share it, takes the same images in batches of the same number. Nothing is opened and no process or thread
    started before the first batch is asked for. One iterator at a time: a second one continues where the first was
    left.

    Args:
        images: the split.
        preprocessing: from decoded image to network input.
        batch_size: B, images a batch of this rank; its rows are as many in each view.
        device: where the batches are delivered.
        workers: decoding threads or processes of this rank.
        shuffle: a new order of the whole split for every epoch, else always the order of `images`.
        order: which images are seen together, as views of a batch.
        seed: of order and augmentation; the same on every rank.
        rank, world: this rank and how many there are.
        on_reshard: what a state of another batch size or number of ranks means: an error, or its epoch from
            the beginning.
        views: the fixed views of the images, in which alone they are shown. Default: augmentation without end.
    """

    name: ClassVar[str]
    """Which implementation this is, as in `data.loader`."""

    def __init__(
        self,
        images: ImageSet,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        device: torch.device,
        workers: int,
        shuffle: bool,
        order: Order = Shuffled(),
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        on_reshard: Literal["refuse", "restart_epoch"] = "refuse",
        views: ViewSource | None = None,
    ) -> None:
        self.images = images
        self.preprocessing = preprocessing
        self.device = device
        self.workers = workers
        self.on_reshard = on_reshard
        self.order = order
        self.batch_size = batch_size
        self.views = views
        self._epochs = EpochOrder(
            images.labels,
            batch_size,
            shuffle=shuffle,
            order=order,
            seed=seed,
            rank=rank,
            world=world,
            views=views and views.count,
        )
        self.batches_per_epoch = self._epochs.batches
        self.images_per_epoch = len(images)
        self._labels = torch.from_numpy(images.labels)
        self._epoch = 0
        self._handed_out = 0  # batches of this epoch
        self._iterators = 0  # that have begun

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current epoch, then stand at the start of the next one.

        A loader has one position: once another iterator has begun, this one gives no more.

        Raises:
            InputError: an image cannot be read or decoded; the message names it.
            RuntimeError: another iterator has begun meanwhile.
        """
        self._iterators += 1
        mine = self._iterators
        places = self._epochs.places(self._epoch)
        loaded = self._epochs.images_to_load(self._epoch) if self.views else None
        for images in self._rest_of_epoch(self._epoch, self._handed_out):
            batch = self._batch(images, places[self._handed_out])
            if loaded is not None:
                view = self._epochs.views_to_show(self._epoch, loaded[self._handed_out])
                batch = batch._replace(view=self._delivered(torch.from_numpy(view)))
            # Before it is handed out: a state taken while it is in use counts it as seen.
            self._handed_out += 1
            if self._handed_out == self.batches_per_epoch:
                self._epoch, self._handed_out = self._epoch + 1, 0
            yield batch
            if self._iterators != mine:
                raise RuntimeError(
                    f"an iterator over the {self.images.split} images was asked for more after a newer one had begun; "
                    "a loader has one position: use one iterator at a time"
                )

    def state_dict(self) -> dict[str, Any]:
        """Position, order and random state of this rank as JSON values; exact in the middle of an epoch."""
        return {**self._identity(), "epoch": self._epoch, "step": self._handed_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, or at the start of its epoch: see `on_reshard`.

        Raises:
            InputError: `state` is of another data set, split, seed, order, loader or preprocessing, or, unless
                `on_reshard` allows it, of another batch size, rank or rank count; the position is then unchanged.
        """
        resharded = False
        for key, here in ({"views": None} | self._identity()).items():
            saved = state.get(key)
            if saved == here:
                continue
            if key in _SHARDING and self.on_reshard == "restart_epoch":
                resharded = True
                continue
            remedy = " or with data.on_reshard=restart_epoch," if key in _SHARDING else ""
            raise InputError(
                f"the saved position in the {self.images.split} images is of {key} {saved!r}, but this run "
                f"has {key} {here!r}; resume with the same {key}{remedy} or start a new run"
            )
        self._epoch, self._handed_out = state["epoch"], 0 if resharded else state["step"]
        self._restore(None if resharded else state)

    @abstractmethod
    def _rest_of_epoch(self, epoch: int, first: int) -> Iterator[torch.Tensor]:
        """The images to load for each of an epoch's batches from number `first` on, augmented: rows x 3 x S x S."""

    @abstractmethod
    def _restore(self, state: dict[str, Any] | None) -> None:
        """Take over what a subclass added to the state; None begins anew at the current epoch."""

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a state to mean the same images in the same order."""
        return {
            "loader": self.name,
            "split": self.images.split,
            "images": len(self.images),
            "digest": self.images.digest,
            "batch_size": self.batch_size,
            "world": self._epochs.world,
            "rank": self._epochs.rank,
            "seed": self._epochs.seed,
            "shuffle": self._epochs.shuffle,
            "order": repr(self.order),
            "preprocessing": repr(self.preprocessing),
            **({"views": self.views.count} if self.views else {}),
        }

    def _batch(self, images: torch.Tensor, places: np.ndarray) -> Batch:
        """Complete a batch from its loaded images and their places, and deliver it."""
        index = torch.from_numpy(self._epochs.images_at(places))
        valid = torch.from_numpy(self._epochs.valid(places))
        fields = (images, self._labels[index], valid, index)
        images, labels, valid, index = map(self._delivered, fields)
        if isinstance(self.order, Rotations):
            images = rotations(images, self.order.count)
        return Batch(images, labels, valid, index, views=self.order.count)

    def _delivered(self, field: torch.Tensor) -> torch.Tensor:
        """On the loader's device; the host does not wait."""
        if self.device.type != "cuda" or field.is_cuda:
            return field
        return field.pin_memory().to(self.device, non_blocking=True)
