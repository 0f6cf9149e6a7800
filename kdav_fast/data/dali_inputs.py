"""What DALI is fed: files or pixels, and, where images have fixed views, the parameters of those to show."""

from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import tee
from typing import Any

import numpy as np

from kdav_fast.data.image_set import EncodedImages, PixelImages
from kdav_fast.data.read_ahead import read_ahead, read_and_measure
from kdav_fast.data.resident import picked_rows
from kdav_fast.data.view_parameters import ViewParameters, ViewSource

_READ_AHEAD = 2
"""Batches whose files are read before they are asked for."""


def contents_of(images: EncodedImages | PixelImages, batches: Iterator[np.ndarray]) -> Iterator:
    """The files, or the pixels, of every batch's images."""
    if isinstance(images, PixelImages):
        return picked_rows(images.pixels, batches)
    return read_ahead(batches, images, _READ_AHEAD)


def with_parameters(
    images: EncodedImages | PixelImages, batches: Iterator[tuple[np.ndarray, np.ndarray]], views: ViewSource
) -> tuple[Iterator, Iterator[ViewParameters]]:
    """The same, and the parameters of every batch's views. Each may be asked before the other.

    Args:
        images: the split.
        batches: positions and views of the rows of each; endless.
        views: gives the parameters.
    """
    batches, to_read = tee(batches)
    positions = (batch for batch, _ in to_read)
    if views.needs_sizes and isinstance(images, EncodedImages):
        measured = read_and_measure(positions, images, _READ_AHEAD)
    else:
        sizes = np.array([images.pixels.shape[1:3]]) if views.needs_sizes else None
        measured = map(partial(_pair, sizes), contents_of(images, positions))
    # `map` and `_unzipped` keep nothing that they have handed out: the reader's memory is used again.
    return _unzipped(map(partial(_parameterised, views), batches, measured))


def _pair(sizes: np.ndarray | None, contents: Any) -> tuple[Any, np.ndarray | None]:
    return contents, sizes


def _parameterised(
    views: ViewSource, batch: tuple[np.ndarray, np.ndarray], measured: tuple[Any, np.ndarray | None]
) -> tuple[Any, ViewParameters]:
    contents, sizes = measured
    return contents, views.parameters(*batch, sizes)


def _unzipped(pairs: Iterator[tuple[Any, Any]]) -> tuple[Iterator, Iterator]:
    """The first and the second parts of endless pairs; unlike `itertools.tee`, neither keeps the other's alive."""
    queues = (deque(), deque())

    def parts(queue: deque) -> Iterator:
        while True:
            if not queue:
                for each, part in zip(queues, next(pairs), strict=True):
                    each.append(part)
            yield queue.popleft()

    return parts(queues[0]), parts(queues[1])
