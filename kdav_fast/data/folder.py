"""A data set as a tree of class folders: `ROOT/SPLIT/CLASS/**/IMAGE`."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from kdav_fast.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
"""What DALI and PIL both decode; upper and lower case alike."""


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """One split: N images in a fixed order, so that a position in `paths` names an image."""

    root: Path
    split: str
    """The folder below `root`: `train`, `val` or `test`."""
    classes: tuple[str, ...]
    """Class names, sorted; a label is a position in it."""
    paths: tuple[str, ...]
    """N paths relative to `root`, sorted within a class."""
    labels: np.ndarray
    """N class ids, int64."""

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal; equal for equal paths and labels in equal order, wherever `root` is."""
        content = hashlib.sha256("\0".join(self.paths).encode())
        content.update(self.labels.tobytes())
        return content.hexdigest()


def open_folder(root: Path) -> tuple[ImageFolder, ImageFolder]:
    """Index `train/` and `val/`, or `test/` where there is no `val/`.

    Raises:
        InputError: a folder is missing, empty or unreadable, or the two splits differ in their classes.
    """
    _require_root(root)
    if not (root / "train").is_dir():
        raise InputError(f"data.root {root} has no train/ folder; put training images at train/CLASS/IMAGE")
    evaluation = open_evaluation_folder(root)
    train = index_folder(root, "train")
    if train.classes != evaluation.classes:
        differences = [
            f"only {one.split}/ has {_some(set(one.classes) - set(other.classes))}"
            for one, other in ((train, evaluation), (evaluation, train))
            if set(one.classes) - set(other.classes)
        ]
        raise InputError(
            f"the classes of train/ and {evaluation.split}/ in {root} differ: {'; '.join(differences)}; "
            "both need the same class folders"
        )
    return train, evaluation


def open_evaluation_folder(root: Path) -> ImageFolder:
    """Index `val/`, or `test/` where there is no `val/`.

    Raises:
        InputError: there is neither, or it is empty or unreadable.
    """
    _require_root(root)
    for split in ("val", "test"):
        if (root / split).is_dir():
            return index_folder(root, split)
    raise InputError(f"data.root {root} has neither val/ nor test/; put evaluation images at val/CLASS/IMAGE")


def index_folder(root: Path, split: str) -> ImageFolder:
    """List the images of `root/split`, sorted by class, then by path.

    Names that start with a dot are passed over; links to folders are followed.

    Raises:
        InputError: no class folder, a class folder without an image, or a folder that cannot be read.
    """
    folder = root / split
    try:
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise _unreadable(error) from None
    if not classes:
        raise InputError(f"{folder} has no class folders; put images at {split}/CLASS/IMAGE")
    paths: list[str] = []
    counts = []
    for name in classes:
        images = sorted(_images_below(root, f"{split}/{name}"))
        if not images:
            raise InputError(
                f"class folder {folder / name} holds no images ({', '.join(IMAGE_SUFFIXES)}); fill or remove it"
            )
        paths += images
        counts.append(len(images))
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return ImageFolder(root, split, tuple(classes), tuple(paths), labels)


def take_subset(folder: ImageFolder, count: int, seed: int) -> ImageFolder:
    """The first `count` images of a seeded permutation, put back into the order of `folder`.

    All classes stay, even one that lost every image; positions count within the subset.

    Raises:
        InputError: `folder` has fewer than `count` images.
    """
    if count > len(folder):
        raise InputError(
            f"data.train_subset is {count} but {folder.root / folder.split} has {len(folder)} images; lower it"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(folder))[:count])
    return replace(folder, paths=tuple(folder.paths[i] for i in chosen), labels=folder.labels[chosen])


def _require_root(root: Path) -> None:
    if not root.is_dir():
        raise InputError(
            f"data.root {root} is not a folder; give the folder that holds train/ and val/ or test/"
        )


def _images_below(root: Path, folder: str) -> Iterator[str]:
    """Paths relative to `root` of the images at any depth below `root/folder`."""

    def stop(error: OSError) -> None:
        raise _unreadable(error)

    prefix = len(f"{root}{os.sep}")
    for directory, folders, names in os.walk(root / folder, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        for name in names:
            if name[0] == "." or not name.lower().endswith(IMAGE_SUFFIXES):
                continue
            path = f"{directory}{os.sep}{name}"[prefix:]
            try:
                path.encode()
            except UnicodeEncodeError:
                raise InputError(
                    f"the file name {path!a} in {root} is not valid UTF-8; rename the file"
                ) from None
            yield path


def _unreadable(error: OSError) -> InputError:
    return InputError(f"folder {error.filename} cannot be read: {error.strerror}; check its permissions")


def _some(names: set[str], most: int = 5) -> str:
    listed = ", ".join(repr(name) for name in sorted(names)[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
