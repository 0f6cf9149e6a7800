"""Which images a rank sees in which step: the same images in the same step, however many ranks share it."""

from collections.abc import Iterator
from itertools import count

import numpy as np


class EpochOrder:
    """One rank's part of the order of every epoch, which follows from (seed, epoch) alone.

    A step takes the next B W places of the epoch's order; rank r of W has the rows [r B, (r + 1) B) of them.
    All ranks make equally many steps.

    In training, the order is filled up to whole steps with other images of the split, from all over it. They are
    shuffled in among the others and are not valid. (Were the last batch padded with copies of one image
    instead, BatchNorm would take its statistics from that one.) In evaluation, padding stands at the end and
    repeats the last image; a rank can end on a batch that is padding throughout.

    Args:
        images: N, how many the split has.
        batch_size: B, images a batch of this rank.
        shuffle: training: a new order of the whole split for every epoch. Else always 0..N-1.
        seed: of the order; the same on every rank.
        rank, world: this rank and W, how many there are.
    """

    def __init__(
        self, images: int, batch_size: int, *, shuffle: bool, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        self.images, self.batch_size = images, batch_size
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.world = rank, world
        self.steps = -(-images // (batch_size * world))
        """Batches an epoch, the same on every rank."""
        added = np.arange(self.steps * batch_size * world - images)
        repeated = added * images // max(1, len(added)) if shuffle else np.full(len(added), images - 1)
        self._image_at = np.concatenate([np.arange(images), repeated])

    def places(self, epoch: int) -> np.ndarray:
        """steps x B places of this rank; those below N are the images themselves, the others repeat one."""
        order = np.arange(len(self._image_at))
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        return order.reshape(self.steps, self.world, self.batch_size)[:, self.rank]

    def valid(self, places: np.ndarray) -> np.ndarray:
        """Which places are images that no other place shows: each image once an epoch, over all ranks."""
        return places < self.images

    def images_at(self, places: np.ndarray) -> np.ndarray:
        """Positions in the split."""
        return self._image_at[places]

    def upcoming(self, epoch: int, step: int) -> Iterator[np.ndarray]:
        """B image positions for every batch from a step on, over the epochs' ends, without end."""
        for later in count(epoch):
            yield from self.images_at(self.places(later)[step:])
            step = 0
