"""Writing a cache, a shard at a time: each is whole or not there, whatever stops the program or the machine.

A shard's bytes follow from the card and the answers alone, so it does not matter which process makes which, nor in
which order, nor how often somebody was stopped.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdav_fast.errors import InputError, listed
from kdav_fast.runtime.files import unfinished, write_whole_by_many
from kdav_fast.teachers.cache.card import CacheCard, differences, found_card, write_card
from kdav_fast.teachers.cache.shard_file import (
    blocks_of,
    defects,
    shard_header,
    shard_path,
    shard_size,
)
from kdav_fast.teachers.cache.stored import carrying, to_stored

_MIB = 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepare(
    folder: Path, card: CacheCard, sums: bool = True, progress: Callable[[], object] = lambda: None
) -> dict[int, str]:
    """Begin a cache, or go on with one: its shards that are to be made, and why.

    To be called by one process, which alone uses the folder and tells the others. Removes what killed ones left.

    Args:
        folder: made if there is none.
        card: what the cache is to be.
        sums: read all shards that are there; otherwise only their headers and sizes.
        progress: called after each shard, in whichever thread.

    Raises:
        InputError: the folder holds another cache, cannot be written, or has no room for these shards.
    """
    there, problem = found_card(folder)
    if there is not None and there.name != card.name:
        found = list(differences(_facts(there), _facts(card)))
        raise InputError(
            f"{folder} holds another cache than this one: {listed(found, 6, '; ')}; give another folder, or remove it"
        )
    try:
        found = defects(folder, card, sums, progress=progress)
        if there is None:
            _refuse_others(folder, found, problem)
            write_card(folder, card)
        for leftover in unfinished(folder):
            leftover.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise InputError(
            f"the teacher's cache {folder} cannot be written: {error.strerror}; make room, or give a folder that can be"
        ) from None
    needed = sum(shard_size(card, shard) for shard in found)
    if needed > free:
        raise InputError(
            f"the teacher's cache {folder} needs {_mib(needed)} for {len(found):,} more shards, but {_mib(free)} are "
            "free there; make room, give another folder, or keep less: fewer views, top, no features"
        )
    return found


class ShardDraft:
    """A shard in the making, in memory, until `write` gives it to the disk as a whole.

    Args:
        folder: of the cache, after `prepare`.
        card: of the cache.
        shard: its number.
    """

    def __init__(self, folder: Path, card: CacheCard, shard: int) -> None:
        if not 0 <= shard < card.layout.shards:
            raise ValueError(f"there is no shard {shard}; the cache has {card.layout.shards}, from 0")
        self._folder, self._card, self._shard = folder, card, shard
        self.images = card.layout.images_of(shard)
        """Whose views it needs, all of them."""
        self._begin = len(shard_header(card, shard))
        self._content = bytearray(shard_size(card, shard))
        data = np.frombuffer(self._content, np.uint8)[self._begin :]
        self._blocks = blocks_of(card.layout, shard, data)
        self._filled = np.zeros(card.layout.records_of(shard), bool)

    def put(
        self,
        index: NDArray[np.int64],
        view: NDArray[np.int64],
        features: Tensor | None,
        logits: Tensor,
        parameters: Mapping[str, NDArray] | None = None,
    ) -> None:
        """Add the answers to some views, in any order.

        Args:
            index: n positions of images in the training split.
            view: n numbers of views.
            features: n x width; None where none are kept.
            logits: n x classes.
            parameters: n x width arrays by name: all that the layout has, in its formats.

        Raises:
            InputError: an answer is not finite, or too large for its format.
            ValueError: a view is of another shard or was put before, or what is given is of another shape or has other
                parameters than the layout.
        """
        index, view = np.asarray(index), np.asarray(view)
        shard, rows = self._card.layout.places(index, view)
        if (shard != self._shard).any() or self._filled[rows].any() or len(np.unique(rows)) < len(rows):
            raise ValueError(f"these views are not of shard {self._shard}, or come twice")
        self._check_shapes(len(rows), features, logits)
        stored = to_stored(self._card.layout, features, logits)
        for name, values in stored.items():
            self._check_finite(name, values, index, view)
            self._blocks[name][rows] = carrying(values.cpu()).numpy()
        self._put_parameters(rows, parameters or {})
        self._filled[rows] = True

    def write(self) -> None:
        """Give it to the disk, and wait until that has it.

        Raises:
            InputError: it cannot be written; what was there before is as it was.
            ValueError: not all views were put.
        """
        if not self._filled.all():
            missing = np.count_nonzero(~self._filled)
            raise ValueError(f"{missing} of the {len(self._filled)} views of shard {self._shard} are missing")
        digest = hashlib.sha256(memoryview(self._content)[self._begin :]).hexdigest()
        self._content[: self._begin] = shard_header(self._card, self._shard, digest)
        try:
            write_whole_by_many(shard_path(self._folder, self._shard), self._content)
        except OSError as error:
            raise self._not_written(error) from None

    def _check_shapes(self, count: int, features: Tensor | None, logits: Tensor) -> None:
        """Others might be stored as well: repeated."""
        layout = self._card.layout
        given = {"logits": (logits, layout.classes)}
        if layout.features:
            given["features"] = features, layout.width
        for name, (values, width) in given.items():
            shape = None if values is None else tuple(values.shape)
            if shape != (count, width):
                raise ValueError(f"the {name} of {count} views are of shape {shape}; give {(count, width)}")

    def _check_finite(
        self, name: str, values: Tensor, index: NDArray[np.int64], view: NDArray[np.int64]
    ) -> None:
        if not values.is_floating_point():
            return
        finite = values.isfinite().all(1)
        if not finite.all():
            first = int(torch.nonzero(~finite)[0])
            what = "features" if name == "features" else "logits"
            kept = getattr(self._card.layout, what)
            raise InputError(
                f"the teacher's {what} of view {view[first]} of image {index[first]} are not finite in {kept}, in "
                f"which the cache {self._folder} keeps them; keep them in fp32, and if they are not finite there "
                "either, mend the teacher"
            )

    def _put_parameters(self, rows: NDArray[np.int64], given: Mapping[str, NDArray]) -> None:
        if given.keys() != self._card.layout.parameters.keys():
            raise ValueError(
                f"the cache keeps {', '.join(self._card.layout.parameters) or 'no parameters'} of a view; given: "
                f"{', '.join(given) or 'none'}"
            )
        for name, values in given.items():
            block = self._blocks[f"view.{name}"]
            if values.dtype != block.dtype:
                raise ValueError(f"{name} is of {values.dtype}; the cache keeps {block.dtype}")
            wanted = (len(rows), block.shape[1])
            if values.shape not in (wanted, wanted[:1] if wanted[1] == 1 else wanted):
                raise ValueError(f"{name} is of shape {values.shape}; give {wanted}")
            block[rows] = values.reshape(wanted)

    def _not_written(self, error: OSError) -> InputError:
        room = ""
        if error.errno in _FULL:
            free = shutil.disk_usage(self._folder).free
            room = f": {_mib(len(self._content))} are needed, {_mib(free)} are free"
        return InputError(
            f"shard {self._shard} of the teacher's cache {self._folder} could not be written ({error.strerror}{room}); "
            "those before it are whole: put that right, then the same command makes the others"
        )


def _refuse_others(folder: Path, found: Mapping[int, str], problem: str | None) -> None:
    """Shards without a card, of which none is this cache's, are not ours to write over."""
    others = [text for text in found.values() if "another cache" in text]
    if others:
        raise InputError(
            f"{folder} holds shards of another cache ({others[0]}), and {problem}; give another folder, or remove "
            "it"
        )


def _facts(card: CacheCard) -> dict[str, Any]:
    values = json.loads(card.content)
    return values["layout"] | values["facts"]


def _mib(count: int) -> str:
    return f"{count / _MIB:,.1f} MiB"
