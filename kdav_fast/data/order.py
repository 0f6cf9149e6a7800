"""Which images a rank sees in which batch: the same images together, however many ranks share them."""

from collections.abc import Iterator
from itertools import count

import numpy as np

from kdav_fast.data.view_order import ViewOrder
from kdav_fast.data.views import ClassPairs, Order, Shuffled

_PARTNERS = 1  # random stream of an epoch, beside that of its order


class EpochOrder:
    """One rank's part of the order of every epoch, which follows from (seed, epoch) alone.

    The batches of one number, of all W ranks, take the next B W places of the epoch's order; rank r has the rows
    [r B, (r + 1) B) of them. All ranks have equally many batches.

    In training, the order is filled up to whole batches with other images of the split, from all over it. They are
    shuffled in among the others and are not valid. (Were the last batch padded with copies of one image
    instead, BatchNorm would take its statistics from that one.) In evaluation, padding stands at the end and
    repeats the last image; a rank can end on a batch that is padding throughout.

    Args:
        labels: N class ids, one an image of the split.
        batch_size: B, images a batch of this rank.
        shuffle: training: a new order of the whole split for every epoch. Else always 0..N-1.
        order: which images are seen together.
        seed: of order and pairs; the same on every rank.
        rank, world: this rank and W, how many there are.
        views: how many fixed views an image has, if it has.
    """

    def __init__(
        self,
        labels: np.ndarray,
        batch_size: int,
        *,
        shuffle: bool,
        order: Order = Shuffled(),
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        views: int | None = None,
    ) -> None:
        self.images, self.batch_size = len(labels), batch_size
        self.shuffle, self.order, self.seed = shuffle, order, seed
        self.rank, self.world = rank, world
        self.batches = -(-self.images // (batch_size * world))
        """How many an epoch has, the same on every rank."""
        added = np.arange(self.batches * batch_size * world - self.images)
        repeated = (
            added * self.images // max(1, len(added)) if shuffle else np.full(len(added), self.images - 1)
        )
        self._image_at = np.concatenate([np.arange(self.images), repeated])
        self._partners = _Partners(labels) if isinstance(order, ClassPairs) else None
        self._views = views and ViewOrder(views, order.loaded, shuffle=shuffle, seed=seed)

    @property
    def rows(self) -> int:
        """Images to load for a batch: B in each view that is loaded."""
        return self.order.loaded * self.batch_size

    def places(self, epoch: int) -> np.ndarray:
        """Batches x B places of this rank; those below N are the images themselves, the others repeat one."""
        order = np.arange(len(self._image_at))
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        return order.reshape(self.batches, self.world, self.batch_size)[:, self.rank]

    def valid(self, places: np.ndarray) -> np.ndarray:
        """Which places are images that no other place shows: each image once an epoch, over all ranks."""
        return places < self.images

    def images_at(self, places: np.ndarray) -> np.ndarray:
        """Positions in the split, of the first view."""
        return self._image_at[places]

    def images_to_load(self, epoch: int) -> np.ndarray:
        """Batches x `rows` positions in the split, for each batch all of the first view first."""
        places = self.places(epoch)
        images = self.images_at(places)
        if self._partners is None:
            return np.tile(images, self.order.loaded)
        # A place's number is the same however many others there are.
        numbers = np.random.default_rng((self.seed, epoch, _PARTNERS)).random(len(self._image_at))
        return np.concatenate([images, self._partners.draw(images, numbers[places])], axis=1)

    def upcoming(self, epoch: int, first: int) -> Iterator[np.ndarray]:
        """The images to load for every batch from number `first` of an epoch on, over the epochs' ends, without end."""
        return (images for _, images in self._upcoming(epoch, first))

    def upcoming_views(self, epoch: int, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same where images have fixed views, each batch with those to show."""
        return ((images, self.views_to_show(later, images)) for later, images in self._upcoming(epoch, first))

    def views_to_show(self, epoch: int, images: np.ndarray) -> np.ndarray | None:
        """The fixed view of each of a batch's images to load; None where they have none."""
        return self._views and self._views.shown(epoch, images)

    def _upcoming(self, epoch: int, first: int) -> Iterator[tuple[int, np.ndarray]]:
        for later in count(epoch):
            for images in self.images_to_load(later)[first:]:
                yield later, images
            first = 0


class _Partners:
    """Images of the same class."""

    def __init__(self, labels: np.ndarray) -> None:
        self._labels = labels
        self._by_class = np.argsort(labels, kind="stable")
        self._sizes = np.bincount(labels)
        self._starts = self._sizes.cumsum() - self._sizes

    def draw(self, images: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """For each image one of its class, itself included, chosen by a uniform number in 0..1 (1 excluded)."""
        labels = self._labels[images]
        return self._by_class[self._starts[labels] + (numbers * self._sizes[labels]).astype(np.int64)]
