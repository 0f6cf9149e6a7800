"""A data set as tar shards in WebDataset's convention: `KEY.jpg` and `KEY.cls` next to each other."""

import hashlib
import os
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kdav_fast.data.fingerprint import content_of
from kdav_fast.data.image_set import ByteRange, EncodedImages, Places, printable
from kdav_fast.data.sources.folder import open_regular_file
from kdav_fast.data.sources.tar_index import index_shards
from kdav_fast.errors import InputError, listed

_MOST_NAMES = 10  # times the classes that have images: of more names, most are a mistake
_SPLIT_WORDS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
_TAR = re.compile(r"[^.].*\.(?:tar|tgz|tbz2|txz|tar\.(?:gz|bz2|xz|zst|lz4))")
# The last split word counts, so that no shard is of two splits.
_SPLIT_IN_NAME = re.compile(rf".*(?<![a-z\d])({'|'.join(_SPLIT_WORDS)})(?![a-z])")


@dataclass(frozen=True, eq=False)
class TarShards(EncodedImages):
    """One split of images in tar shards below `root`."""

    shards: tuple[str, ...]
    """Paths of the tar files relative to `root`, sorted."""
    members: tuple[str, ...]
    """N paths within the shards. A name that is not UTF-8 holds surrogate escapes."""
    shard_ids: np.ndarray
    """N positions in `shards`, int32."""
    offsets: np.ndarray
    """First byte of each of N images in its shard, int64."""
    sizes: np.ndarray
    """Bytes of each of N images, int64."""

    def name(self, position: int) -> str:
        return f"{self.shards[self.shard_ids[position]]}/{self.members[position]}"

    @cached_property
    def digest(self) -> str:
        content = hashlib.sha256(os.fsencode("\0".join(map(self.name, range(len(self))))))
        content.update(self.labels.tobytes())
        return content.hexdigest()

    def select(self, positions: np.ndarray) -> "TarShards":
        return replace(
            self,
            labels=self.labels[positions],
            members=tuple(self.members[i] for i in positions),
            shard_ids=self.shard_ids[positions],
            offsets=self.offsets[positions],
            sizes=self.sizes[positions],
        )

    def open(self, position: int) -> BinaryIO:
        shard = open_regular_file(self._path(position))
        return ByteRange(shard, int(self.offsets[position]), int(self.sizes[position]))

    def places(self, positions: np.ndarray) -> Places:
        root = f"{self.root}{os.sep}"
        paths = [root + self.shards[shard] for shard in self.shard_ids[positions].tolist()]
        return Places(paths, self.offsets[positions], self.sizes[positions])

    def byte_sizes(self) -> np.ndarray:
        return self.sizes

    def signature(self, position: int) -> str:
        status = Path(self._path(position)).stat()
        return f"{status.st_size} {status.st_mtime_ns} {self.offsets[position]}"

    def _path(self, position: int) -> str:
        return f"{self.root}{os.sep}{self.shards[self.shard_ids[position]]}"


def open_shards(root: Path) -> tuple[TarShards, TarShards]:
    """Index the shards `train-*.tar`, and `val-*.tar` or `validation-*.tar`, else `test-*.tar`.

    Any prefix may stand before the split's word (`imagenet1k-train-0000.tar`); shards of any name may lie in
    a folder of that word. Class names are the lines of `root/classes.txt`, else the labels as text.

    Raises:
        InputError: a split has no shards, a shard is not as it must be or there twice, a label has no class name,
            without `classes.txt` a class below the largest label has no training image, or with it most have none.
    """
    shards = _find_shards(root)
    evaluation_split = _choose_split(root, shards, "val", "test")
    train = _index_split(root, _choose_split(root, shards, "train"), shards)
    evaluation = _index_split(root, evaluation_split, shards)
    for images in (train, evaluation):
        _refuse_repeated_shards(images)
    names = _listed_classes(root)
    if names is None:
        names = _numbered_classes(train, evaluation)
    elif len(names) > _MOST_NAMES * (seen := len(np.unique(train.labels))):
        raise InputError(
            f"{root / 'classes.txt'} names {len(names):,} classes, but the training shards hold images of only "
            f"{seen:,}; give the list of this data set's classes"
        )
    return _with_classes(train, names), _with_classes(evaluation, names)


def _numbered_classes(train: TarShards, evaluation: TarShards) -> tuple[str, ...]:
    """Labels as text, if there are training images of each."""
    last = max((train, evaluation), key=lambda images: images.labels.max())
    position = int(last.labels.argmax())
    count = int(last.labels[position]) + 1
    absent = np.flatnonzero(np.bincount(train.labels, minlength=count) == 0).tolist()
    if absent:
        raise InputError(
            f"{printable(last.name(position))} in {train.root} has label {count - 1}, but the training shards hold no "
            f"image of {listed(absent, 5)}; correct the labels, or name all {count:,} classes in "
            "classes.txt beside the shards"
        )
    return tuple(map(str, range(count)))


def _refuse_repeated_shards(images: TarShards) -> None:
    """A shard that is there twice, by a link or as a copy, would count its images twice."""
    listed: dict[object, tuple[str, int]] = {}
    starts = np.searchsorted(images.shard_ids, np.arange(len(images.shards) + 1)).tolist()
    for shard, (start, end) in zip(images.shards, pairwise(starts), strict=True):
        part = slice(start, end)
        columns = (images.labels[part], images.offsets[part], images.sizes[part])
        listing = (images.members[part], *(column.tobytes() for column in columns))
        name, first = listed.setdefault(listing, (shard, start))
        places = (0, (end - start) // 2, end - start - 1)
        if name != shard and all(
            content_of(images, start + i) == content_of(images, first + i) for i in places
        ):
            raise InputError(
                f"the shards {printable(name)} and {printable(shard)} in {images.root} hold the same images; "
                "remove one of them"
            )


def open_evaluation_shards(root: Path, classes: tuple[str, ...]) -> TarShards:
    """Index only the evaluation shards; see `open_shards`.

    Args:
        root: the folder with the shards.
        classes: names of the classes where there is no `root/classes.txt`.

    Raises:
        InputError: there are no shards, a shard is not as it must be, or a label has no class name.
    """
    shards = _find_shards(root)
    images = _index_split(root, _choose_split(root, shards, "val", "test"), shards)
    return _with_classes(images, _listed_classes(root) or classes)


def _find_shards(root: Path) -> dict[str, list[str]]:
    """Sorted paths relative to `root` of each split's tar files; compressed ones are among them."""
    if not root.is_dir():
        raise InputError(f"data.root {root} is not a folder; give the folder that holds the tar shards")
    shards = defaultdict(list)
    try:
        for path in root.iterdir():
            if path.name in _SPLIT_WORDS and path.is_dir():
                inside = [
                    f"{path.name}/{shard.name}" for shard in path.iterdir() if _TAR.fullmatch(shard.name)
                ]
                shards[_SPLIT_WORDS[path.name]] += inside
            elif _TAR.fullmatch(path.name) and (word := _SPLIT_IN_NAME.match(path.name)):
                shards[_SPLIT_WORDS[word[1]]].append(path.name)
    except OSError as error:
        raise InputError(
            f"folder {printable(error.filename)} cannot be read: {error.strerror}; check its permissions"
        ) from None
    return {split: sorted(paths) for split, paths in shards.items()}


def _choose_split(root: Path, shards: dict[str, list[str]], *splits: str) -> str:
    """The first of some splits that has shards, none of them compressed."""
    for split in splits:
        for shard in shards.get(split, []):
            if not shard.endswith(".tar"):
                raise InputError(
                    f"shard {printable(str(root / shard))} is compressed, but images are read from anywhere in it; "
                    "replace it by the uncompressed .tar"
                )
        if shards.get(split):
            return split
    words = [word for word, split in _SPLIT_WORDS.items() if split in splits]
    raise InputError(
        f"data.root {root} has no {splits[0]} shards; name them {' or '.join(f'{word}-*.tar' for word in words)}, "
        f"or put them into {' or '.join(f'{word}/' for word in words)}"
    )


def _index_split(root: Path, split: str, shards: dict[str, list[str]]) -> TarShards:
    """Index the shards of a split; it has no class names yet."""
    paths = tuple(shards[split])
    indices = index_shards([root / path for path in paths], f"indexing {split}")
    return TarShards(
        root=root,
        split=split,
        classes=(),
        labels=np.concatenate([index.labels for index in indices]),
        shards=paths,
        members=tuple(chain.from_iterable(index.members for index in indices)),
        shard_ids=np.repeat(np.arange(len(paths), dtype=np.int32), [len(index.members) for index in indices]),
        offsets=np.concatenate([index.offsets for index in indices]),
        sizes=np.concatenate([index.sizes for index in indices]),
    )


def _listed_classes(root: Path) -> tuple[str, ...] | None:
    """The lines of `root/classes.txt`, if there is such a file."""
    path = root / "classes.txt"
    try:
        lines = path.read_text("utf-8-sig").rstrip().split("\n")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; give one class name a line, in UTF-8") from None
    names = tuple(line.strip() for line in lines)
    line_of: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if name and line_of.setdefault(name, number) != number:
            raise InputError(
                f"lines {line_of[name]} and {number} of {path} are both '{printable(name)}'; give each class a "
                "name of its own"
            )
    if not all(names):
        raise InputError(
            f"line {names.index('') + 1} of {path} is empty; the name of class i belongs into line i + 1"
        )
    return names


def _with_classes(images: TarShards, classes: tuple[str, ...]) -> TarShards:
    """The images with these class names, if every label has one."""
    position = int(images.labels.argmax())
    if images.labels[position] >= len(classes):
        raise InputError(
            f"{printable(images.name(position))} in {images.root} has label {images.labels[position]}, but there are "
            f"only {len(classes)} class names; labels count from 0, and classes.txt beside the shards names them"
        )
    return replace(images, classes=classes)
