"""A data set as a tree of class folders: `ROOT/SPLIT/CLASS/**/IMAGE`; evaluation images also in one folder."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kdav_fast.data.formats import HEAD_BYTES, IMAGE_SUFFIXES, format_of
from kdav_fast.data.image_set import EncodedImages, Places, is_utf8, printable
from kdav_fast.data.reading_process import open_range
from kdav_fast.data.sources.flat_split import describe_label_files, find_label_file, read_labels
from kdav_fast.errors import InputError, listed

_THREADS = 16  # they wait for the file system most of the time
_CHUNK = 256  # files a task of theirs
_ALL_IMAGES = "images"  # Tiny-ImageNet's folder below val/
# Files that belong to no image set by mistake: lists, labels, descriptions, code.
# fmt: off
_COMPANIONS = (
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".md", ".html", ".log", ".db", ".ini",
    ".py", ".sh", ".lst", ".idx", ".md5", ".sha256",
)
# fmt: on


@dataclass(frozen=True, eq=False)
class ImageFolder(EncodedImages):
    """One split of image files below `root`."""

    paths: tuple[str, ...]
    """N paths relative to `root`, sorted within a class. A name that is not UTF-8 holds surrogate escapes."""

    def name(self, position: int) -> str:
        return self.paths[position]

    @cached_property
    def digest(self) -> str:
        content = hashlib.sha256(os.fsencode("\0".join(self.paths)))
        content.update(self.labels.tobytes())
        return content.hexdigest()

    def select(self, positions: np.ndarray) -> "ImageFolder":
        return replace(self, paths=tuple(self.paths[i] for i in positions), labels=self.labels[positions])

    def open(self, position: int) -> BinaryIO:
        return open_regular_file(self._path(position))

    def places(self, positions: np.ndarray) -> Places:
        paths = [self._path(position) for position in positions.tolist()]
        return Places(paths, np.zeros(len(paths), np.int64), np.full(len(paths), -1))

    def byte_sizes(self) -> np.ndarray:
        return self._byte_sizes

    @cached_property
    def _byte_sizes(self) -> np.ndarray:
        chunks = [range(len(self))[start : start + _CHUNK] for start in range(0, len(self), _CHUNK)]
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda chunk: [_byte_size(self._path(position)) for position in chunk], chunks)
            return np.fromiter(chain.from_iterable(found), np.int64, len(self))

    def signature(self, position: int) -> str:
        status = os.stat(self._path(position))  # noqa: PTH116 - a Path costs twice as much as the call
        return f"{status.st_size} {status.st_mtime_ns}"

    def _path(self, position: int) -> str:
        return f"{self.root}{os.sep}{self.paths[position]}"


def open_folder(root: Path, val_labels: Path | None = None) -> tuple[ImageFolder, ImageFolder]:
    """Index `train/` and `val/`, or `test/` where there is no `val/`.

    Args:
        root: the data set.
        val_labels: as in `open_evaluation_folder`.

    Raises:
        InputError: a folder is missing, empty or unreadable, the two splits differ in their classes, or the
            label file does not fit.
    """
    _require_root(root)
    if not _is_folder(root / "train"):
        raise InputError(f"data.root {root} has no train/ folder; put training images at train/CLASS/IMAGE")
    _evaluation_split(root)  # before the long listing of train/
    train = index_folder(root, "train")
    evaluation = open_evaluation_folder(root, train.classes, val_labels)
    if train.classes != evaluation.classes:
        differences = [
            f"only {one.split}/ has {listed(sorted(map(repr, set(one.classes) - set(other.classes))), 5)}"
            for one, other in ((train, evaluation), (evaluation, train))
            if set(one.classes) - set(other.classes)
        ]
        raise InputError(
            f"the classes of train/ and {evaluation.split}/ in {root} differ: {'; '.join(differences)}; "
            "both need the same class folders"
        )
    return train, evaluation


def open_evaluation_folder(
    root: Path, classes: tuple[str, ...] | None = None, val_labels: Path | None = None
) -> ImageFolder:
    """Index `val/`, or `test/` where there is no `val/`.

    Its images lie in class folders, or all in one folder with a file that names the class of each: see
    `flat_split`. The latter holds when `val_labels` is given, or when no folder of the split is named as a class
    and a label file lies where published data sets have it.

    Args:
        root: the data set.
        classes: names for a split in one folder. Default: the class folders of `train/`.
        val_labels: the label file. Default: looked for.

    Raises:
        InputError: there is neither folder, it is empty or unreadable, or the label file does not fit.
    """
    _require_root(root)
    split = _evaluation_split(root)
    if classes is None:
        classes = tuple(_subfolders(root / "train")) if _is_folder(root / "train") else ()
    folders = set(_subfolders(root / split))
    has_classes = bool(folders & set(classes) if classes else folders - {_ALL_IMAGES})
    if val_labels is None and not has_classes:
        val_labels = find_label_file(root, split)
        if val_labels is None and folders <= {_ALL_IMAGES}:
            raise InputError(
                f"{root / split} has no class folders, and no file was found that tells the classes of its images "
                f"({describe_label_files(split)}); set data.val_labels, or put images at {split}/CLASS/IMAGE"
            )
    return index_folder(root, split) if val_labels is None else _index_flat(root, split, classes, val_labels)


def index_folder(root: Path, split: str) -> ImageFolder:
    """List the images of `root/split`, sorted by class, then by path.

    Names that start with a dot are passed over; links to folders are followed.

    Raises:
        InputError: no class folder, a class folder without an image, or a folder that cannot be read.
    """
    folder = root / split
    classes = _subfolders(folder)
    if not classes:
        raise InputError(f"{folder} has no class folders; put images at {split}/CLASS/IMAGE")
    for name in classes:
        if not is_utf8(name):
            raise InputError(
                f"the class folder {printable(str(folder / name))} is not named in UTF-8, but students carry the "
                "names of their classes; rename the folder"
            )
    paths: list[str] = []
    counts = []
    others: list[str] = []
    for name in classes:
        _refuse_loop(folder / name, root)
        images, beside = _files_below(root, f"{split}/{name}")
        others += beside
        if not images:
            raise InputError(
                f"class folder {folder / name} holds no images ({', '.join(IMAGE_SUFFIXES)}); fill or remove it"
            )
        paths += images
        counts.append(len(images))
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return ImageFolder(root, split, tuple(classes), labels, tuple(paths), remark=_remark(folder, others))


def _index_flat(root: Path, split: str, classes: tuple[str, ...], label_file: Path) -> ImageFolder:
    if not classes:
        raise InputError(
            f"the classes of the images in {root / split} are those of train/, which {root} lacks; add train/CLASS/"
        )
    paths, others = _files_below(root, split)
    if not paths:
        raise InputError(
            f"{root / split} holds no images ({', '.join(IMAGE_SUFFIXES)}), but {label_file} names its classes; "
            "put them there"
        )
    labels = read_labels(label_file, paths, classes)
    return ImageFolder(root, split, classes, labels, tuple(paths), remark=_remark(root / split, others))


def is_image(folder: str, name: str) -> bool:
    """Whether training takes a file: by its suffix, or, without one, by what it begins with."""
    if "." in name:
        return name.lower().endswith(IMAGE_SUFFIXES)
    try:
        with open_regular_file(f"{folder}{os.sep}{name}") as file:
            return format_of(file.read(HEAD_BYTES)) is not None
    except OSError:
        return False


def _byte_size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - see `signature`
    except OSError:
        return -1


def open_regular_file(path: str) -> BinaryIO:
    """Open for reading without a buffer, but never wait for a pipe or a device.

    Raises:
        OSError: it cannot be opened, or it is not a regular file.
    """
    descriptor, _ = open_range(path, -1)
    return os.fdopen(descriptor, "rb", buffering=0)


def _require_root(root: Path) -> None:
    if not _is_folder(root):
        raise InputError(
            f"data.root {root} is not a folder; give the folder that holds train/ and val/ or test/"
        )


def _evaluation_split(root: Path) -> str:
    for split in ("val", "test"):
        if _is_folder(root / split):
            return split
    raise InputError(f"data.root {root} has neither val/ nor test/; put evaluation images at val/CLASS/IMAGE")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # a folder above it cannot be searched
        raise _unreadable(error) from None


def _subfolders(folder: Path) -> list[str]:
    """Sorted names, without those that start with a dot."""
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.name[0] != "." and entry.is_dir())
    except OSError as error:
        raise _unreadable(error) from None


def _files_below(root: Path, folder: str) -> tuple[list[str], list[str]]:
    """Sorted paths relative to `root`, at any depth below `root/folder`: images, and what may be meant as such."""
    images, others = [], []

    def stop(error: OSError) -> None:
        raise _unreadable(error)

    base = f"{root}{os.sep}"  # not root / folder: that drops a root of "."
    for directory, folders, names in os.walk(f"{base}{folder}", onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        for name in folders:
            _refuse_loop(Path(directory, name), root)
        for name in names:
            if name[0] == ".":
                continue
            path = f"{directory}{os.sep}{name}"[len(base) :]
            if is_image(directory, name):
                images.append(path)
            elif "." in name and not name.lower().endswith(_COMPANIONS):
                others.append(path)
    return sorted(images), sorted(others)


def _remark(folder: Path, others: list[str], most: int = 3) -> str | None:
    """What to say about files that may be meant as images."""
    if not others:
        return None
    named = listed(list(map(printable, others)), most)
    files = "1 file is" if len(others) == 1 else f"{len(others):,} files are"
    return (
        f"note: {printable(str(folder))}: {files} passed over by the suffix: {named}; rename or convert what "
        "is meant as an image"
    )


def _refuse_loop(folder: Path, root: Path) -> None:
    """A link to a folder that holds the link would be followed for ever."""
    if folder.is_symlink():
        target = folder.resolve()
        way = (parent.resolve() for parent in folder.parents if parent.is_relative_to(root))
        if any(passed.is_relative_to(target) for passed in way):
            raise InputError(
                f"the link {printable(str(folder))} leads back to a folder above it; remove the link"
            )


def _unreadable(error: OSError) -> InputError:
    return InputError(
        f"folder {printable(str(error.filename))} cannot be read: {error.strerror}; check its permissions"
    )
