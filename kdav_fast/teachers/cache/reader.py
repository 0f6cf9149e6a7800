"""Reading a cache: a teacher's answers by image and view, from files that are mapped into memory."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdav_fast.errors import InputError, listed
from kdav_fast.teachers.cache.card import read_card
from kdav_fast.teachers.cache.shard_file import (
    Blocks,
    blocks_of,
    defect,
    defects,
    shard_header,
    shard_path,
    shard_size,
)
from kdav_fast.teachers.cache.stored import Stored, carrying, to_answers

_MOST_NAMED = 3


class AnswerCache:
    """A whole cache, opened for reading; any number of processes and threads may read it at once.

    It keeps no open files and, of its own, no answers: what was read lately is in the system's page cache.

    Args:
        folder: of the cache.

    Raises:
        InputError: it is no cache, or shards are missing, of another size, or of another cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.card = read_card(folder)
        self.layout = self.card.layout
        self._mapped: dict[int, Blocks] = {}
        self._refuse(defects(folder, self.card, sums=False))

    def require(self, facts: Mapping[str, Any], **layout: int) -> None:
        """Make sure that it is of what a run is; as `CacheCard.require`."""
        self.card.require(self.folder, facts, **layout)

    def verify(self, progress: Callable[[], object] = lambda: None) -> None:
        """Read all of it and compare the sums.

        Args:
            progress: called after each shard, in whichever thread.

        Raises:
            InputError: shards have other content than was written.
        """
        self._refuse(defects(self.folder, self.card, sums=True, progress=progress))

    def answers(self, index: NDArray[np.int64], view: NDArray[np.int64]) -> tuple[Tensor | None, Tensor]:
        """What the teacher answered to some views: features (None where none are kept) and logits, in float32.

        Args:
            index: n positions of images in the training split.
            view: n numbers of views.

        Raises:
            IndexError: there is no such image or view.
        """
        return to_answers(self.layout, self.stored(index, view))

    def stored(self, index: NDArray[np.int64], view: NDArray[np.int64]) -> Stored:
        """The same as it is kept, which is less to copy to a device: `to_answers` makes answers of it there."""
        return self._rows(index, view, [part for part in self.layout.parts if "." not in part.name])

    def parameters(self, index: NDArray[np.int64], view: NDArray[np.int64]) -> Stored:
        """How some views are made: n x width tensors, by name."""
        parts = [part for part in self.layout.parts if part.name.startswith("view.")]
        rows = self._rows(index, view, parts)
        return {name.removeprefix("view."): values for name, values in rows.items()}

    def _rows(self, index: NDArray[np.int64], view: NDArray[np.int64], parts: list) -> Stored:
        shards, rows = self.layout.places(index, view)
        order = np.argsort(shards, kind="stable")
        shards, rows = shards[order], rows[order]
        changes = np.flatnonzero(np.diff(shards, prepend=-1)).tolist()
        by_shard = {part.name: np.empty((len(rows), part.width), part.storage.array) for part in parts}
        # Of a large cache, nearly every row is in a shard of its own: what is done for each must cost next to nothing.
        for start, stop in pairwise([*changes, len(rows)]):
            blocks = self._blocks(int(shards[start]))
            for name, array in by_shard.items():
                blocks[name].take(rows[start:stop], 0, array[start:stop], "clip")
        back = np.argsort(order)
        found = {}
        for part in parts:
            values = torch.empty(len(rows), part.width, dtype=part.storage.tensor)
            by_shard[part.name].take(back, 0, carrying(values).numpy(), "clip")
            found[part.name] = values
        return found

    def _blocks(self, shard: int) -> Blocks:
        if shard not in self._mapped:
            # Once more: it may have been replaced since the cache was opened.
            if problem := defect(self.folder, self.card, shard, sums=False):
                self._refuse({shard: problem})
            path, size = shard_path(self.folder, shard), shard_size(self.card, shard)
            # Private: it is mapped for reading, nothing is written back. Unlike Python's mmap, it keeps no open file,
            # of which a process may have 1,024, and a cache has more shards.
            mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
            begin = len(shard_header(self.card, shard))
            self._mapped[shard] = blocks_of(self.layout, shard, mapped[begin:])
        return self._mapped[shard]

    def _refuse(self, found: dict[int, str]) -> None:
        if found:
            raise InputError(
                f"{len(found):,} of the {self.layout.shards:,} shards of the teacher's cache {self.folder} cannot be "
                f"used: {listed(list(found.values()), _MOST_NAMED, '; ')}; let what made the cache run again, which "
                "makes these and no others"
            )
