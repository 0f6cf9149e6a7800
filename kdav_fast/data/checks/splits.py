"""What is wrong with the two splits of a data set taken together, or makes their figures worth less than they seem."""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from kdav_fast.data.fingerprint import content_of
from kdav_fast.data.image_set import EncodedImages, ImageSet, PixelImages, printable
from kdav_fast.data.sources import Splits
from kdav_fast.errors import InputError, listed

_EXAMINED = 512  # evaluation images
_COMPARED = 4096  # training images of the same size as one of those
_TAIL = 4096  # bytes: files that end alike are compared as a whole
_THREADS = 16


def check_splits(splits: Splits, batch_size: int) -> list[str]:
    """Look at labels and contents of both splits; returns what a user should know, a line each.

    Args:
        splits: after `data.skip_list` and `data.train_subset`.
        batch_size: training images of a step over all processes.

    Raises:
        InputError: all training images are of one class.
    """
    train, evaluation = splits
    counts = np.bincount(train.labels, minlength=len(train.classes))
    if np.count_nonzero(counts) < 2:
        raise InputError(
            f"all {len(train):,} training images in {train.root} are of one class, "
            f"'{printable(train.classes[int(counts.argmax())])}', so that there is nothing to learn; give images of "
            "two classes or more"
        )
    remarks = []
    if batch_size > len(train):
        remarks.append(
            f"warning: train.batch_size is {batch_size} but {train.root} has {len(train)} training images: every step "
            "takes all of them, and fills the batch with some again"
        )
    return [*remarks, *_classes_without_images(splits, counts), *_compare_contents(train, evaluation)]


class Shared(NamedTuple):
    """Evaluation images that are training images, by content."""

    examined: int
    """Evaluation images that were looked at."""
    pairs: list[tuple[int, int]]
    """Positions in the evaluation and in the training split."""


def shared_images(train: ImageSet, evaluation: ImageSet) -> Shared:
    """Which evaluation images have the same bytes as a training image.

    Decoded images are all compared. Of files, up to 512 evaluation images, evenly spread, with training files of the
    same size: all of them where there are up to 4,096 training images, else up to 8, those of the same name first. The
    last 4 KiB are read of each, and of those that end alike the whole, or of large ones both ends.
    """
    if isinstance(train, PixelImages) and isinstance(evaluation, PixelImages):
        known = {_pixels(train, position): position for position in range(len(train))}
        found = ((position, known.get(_pixels(evaluation, position))) for position in range(len(evaluation)))
        return Shared(len(evaluation), [(one, other) for one, other in found if other is not None])
    if not (isinstance(train, EncodedImages) and isinstance(evaluation, EncodedImages)):
        return Shared(0, [])
    examined = np.unique(np.linspace(0, len(evaluation) - 1, _EXAMINED).astype(int)).tolist()
    candidates = _of_equal_size(train, evaluation, examined)
    with ThreadPoolExecutor(_THREADS) as pool:
        needed = sorted({position for positions in candidates.values() for position in positions})
        tails = dict(zip(needed, pool.map(lambda position: _tail(train, position), needed), strict=True))
        own = dict(
            zip(candidates, pool.map(lambda position: _tail(evaluation, position), candidates), strict=True)
        )
        alike = [
            (position, next((other for other in others if tails[other] == own[position]), None))
            for position, others in candidates.items()
            if own[position] is not None
        ]
        alike = [(position, other) for position, other in alike if other is not None]
        same = pool.map(lambda pair: content_of(evaluation, pair[0]) == content_of(train, pair[1]), alike)
        return Shared(len(examined), [pair for pair, equal in zip(alike, same, strict=True) if equal])


def _classes_without_images(splits: Splits, counts: np.ndarray) -> list[str]:
    train, evaluation = splits
    empty = np.flatnonzero(counts == 0)
    if len(empty) == 0:
        return []
    asked = int(np.isin(evaluation.labels, empty).sum())
    of_them = f"; {asked:,} evaluation images are of these" if asked else ""
    names = listed([f"'{printable(train.classes[label])}'" for label in empty], 5)
    return [
        f"warning: {len(empty):,} of {len(train.classes):,} classes have no training image: {names}{of_them}"
    ]


def _compare_contents(train: ImageSet, evaluation: ImageSet) -> list[str]:
    examined, pairs = shared_images(train, evaluation)
    if not pairs:
        return []
    one, other = pairs[0]
    example = f"{printable(evaluation.name(one))} is {printable(train.name(other))}"
    if len(pairs) == examined:
        found = f"all {examined:,} {evaluation.split} images examined are training images"
    else:
        found = (
            f"{len(pairs):,} of {examined:,} {evaluation.split} images examined are training images as well"
        )
    return [f"warning: {found} ({example}), so that the accuracy is not of unseen images"]


def _of_equal_size(
    train: EncodedImages, evaluation: EncodedImages, examined: list[int]
) -> dict[int, list[int]]:
    """For each examined image the training images to compare it with, if any has its size."""
    train_sizes, sizes = train.byte_sizes(), evaluation.byte_sizes()
    order = np.argsort(train_sizes, kind="stable")
    ends = [np.searchsorted(train_sizes[order], sizes[examined], side) for side in ("left", "right")]
    alike = {
        i: order[start:end].tolist() for i, start, end in zip(examined, *ends, strict=True) if sizes[i] > 0
    }
    most = len(train) if len(train) <= _COMPARED else _COMPARED // _EXAMINED
    if any(len(positions) > most for positions in alike.values()):
        names = _positions_by_file_name(train)
        for i, positions in alike.items():
            named = [
                other for other in names.get(_file_name(evaluation, i), []) if train_sizes[other] == sizes[i]
            ]
            alike[i] = list(dict.fromkeys([*named[:most], *positions[:most]]))[:most]
    return {i: positions for i, positions in alike.items() if positions}


def _positions_by_file_name(images: EncodedImages) -> dict[str, list[int]]:
    found = defaultdict(list)
    for position in range(len(images)):
        found[_file_name(images, position)].append(position)
    return found


def _file_name(images: EncodedImages, position: int) -> str:
    return images.name(position).rpartition("/")[2]


def _tail(images: EncodedImages, position: int) -> bytes | None:
    try:
        with images.open(position) as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            return file.read(_TAIL)
    except OSError:
        return None


def _pixels(images: PixelImages, position: int) -> bytes:
    return blake2b(images.pixels[position].cpu().numpy().tobytes(), digest_size=16).digest()
