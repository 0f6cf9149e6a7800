"""Which of its fixed views an image is shown in, and when: none twice before all were."""

from math import lcm

import numpy as np

from kdav_fast.data.counter_random import keys, stream, words

_ORDER = 3  # what the seed is used for, beside what else is drawn from it


class ViewOrder:
    """An epoch shows `loaded` views of each image, all different while V is no less.

    A round of an image shows each of its V views once, in an order that follows from (seed, image, round). Where an
    epoch may lie across the end of a round, the next one keeps that order, so that the epoch shows no view twice; a
    new order begins where a round and an epoch do.

    Args:
        count: V.
        loaded: views of an image that an epoch shows.
        shuffle: else every round goes from view 0 to V-1.
        seed: of the orders.
    """

    def __init__(self, count: int, loaded: int, *, shuffle: bool, seed: int) -> None:
        self._count, self._loaded, self._shuffle = count, loaded, shuffle
        self._kept_for = lcm(count, loaded)  # views that an order of views is kept for
        self._key = stream(seed, _ORDER)

    def shown(self, epoch: int, images: np.ndarray) -> np.ndarray:
        """The views in which a batch's images are shown: `loaded`*B int64 numbers, as are the positions given."""
        shown = [
            self._view(epoch * self._loaded + number, together)
            for number, together in enumerate(images.reshape(self._loaded, -1))
        ]
        return np.concatenate(shown)

    def _view(self, number: int, images: np.ndarray) -> np.ndarray:
        """Of each image, the one that it is shown in after `number` others."""
        order, place = number // self._kept_for, number % self._count
        if not self._shuffle:
            return np.full(len(images), place)
        drawn = words(keys(self._key, images, order), self._count)
        return np.argpartition(drawn, place, axis=1)[:, place]
