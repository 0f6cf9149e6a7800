"""All that is wrong with a tree of class folders: opening it for training stops at the first problem."""

import codecs
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdav_fast.data.formats import IMAGE_SUFFIXES
from kdav_fast.data.image_set import is_utf8
from kdav_fast.data.sources.folder import ImageFolder, is_image, open_regular_file

_Identity = tuple[int, int]  # device and inode: equal for all names of a folder


class Remark(NamedTuple):
    """Something about a file or folder."""

    path: str
    """Relative to the root of the data set, where it lies in there."""
    text: str


@dataclass
class ClassTree:
    """One split as it lies there, fit for training or not."""

    images: ImageFolder
    """Every image that training would meet. Without class folders: those right in the split's folder."""
    problems: list[Remark] = field(default_factory=list)
    notes: list[Remark] = field(default_factory=list)
    """What training gets along with."""


def walk_classes(root: Path, split: str) -> ClassTree:
    """Index `root/split` as `index_folder` does, but collect problems instead of stopping."""
    walk = _Walk(root)
    above = (_identity(root), _identity(root / split))
    classes, loose = walk.class_folders(split)
    below = [sorted(walk.images_below(f"{split}/{name}", above)) for name in classes]
    for name, paths in zip(classes, below, strict=True):
        if not paths and f"{split}/{name}" not in walk.unlisted:
            walk.problem(f"{split}/{name}", "a class folder without images; fill or remove it")
    if classes:
        for path in loose:
            walk.problem(path, "in no class folder, so that training passes it over; move or remove it")
    else:
        below = [loose]
    labels = np.repeat(np.arange(len(below), dtype=np.int64), [len(paths) for paths in below])
    paths = tuple(path for paths in below for path in paths)
    images = ImageFolder(root=root, split=split, classes=tuple(classes), labels=labels, paths=paths)
    return ClassTree(images, walk.problems, walk.notes)


def compare_classes(one: ImageFolder, other: ImageFolder) -> list[Remark]:
    """The class folders that only one of two splits has; nothing where a split has none."""
    if one.classes and other.classes and not set(one.classes) & set(other.classes):
        return [
            Remark(other.split, f"no class in common with {one.split}/; both need the same class folders")
        ]
    if not one.classes or not other.classes:
        return []
    remarks = []
    for here, there in ((one, other), (other, one)):
        alike = {_folded(name): name for name in there.classes}
        for name in sorted(set(here.classes) - set(there.classes)):
            near = alike.get(_folded(name))
            hint = f" (but {there.split}/{near})" if near else ""
            remarks.append(Remark(f"{here.split}/{name}", f"no such class in {there.split}/{hint}"))
    return remarks


class _Walk:
    """Lists folders; what cannot be listed or used becomes a problem."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problems: list[Remark] = []
        self.notes: list[Remark] = []
        self.unlisted: set[str] = set()

    def problem(self, path: str, text: str) -> None:
        self.problems.append(Remark(path, text))

    def class_folders(self, split: str) -> tuple[list[str], list[str]]:
        """Names of the class folders of a split; paths of the images beside them."""
        classes, loose = [], []
        for entry in self._entries(split):
            path = f"{split}/{entry.name}"
            if _is_folder(entry):
                classes.append(entry.name)
                self._check_class_name(path, entry.name)
            elif is_image(f"{self.root}/{split}", entry.name):
                loose.append(path)
            elif not Path(entry.path).exists():
                self.problem(path, "a link that leads nowhere; repair or remove it")
        self._find_same_classes(split, classes)
        return classes, loose

    def images_below(self, folder: str, above: tuple[_Identity, ...]) -> Iterator[str]:
        """Images at any depth below a folder that was reached through the folders `above`."""
        here = _identity(self.root / folder)
        if here in above:
            self.unlisted.add(folder)
            self.problem(folder, "a link that leads back to a folder above it; remove the link")
            return
        for entry in self._entries(folder):
            path = f"{folder}/{entry.name}"
            self._check_line(path, entry.name)
            if _is_folder(entry):
                yield from self.images_below(path, (*above, here))
            elif is_image(f"{self.root}/{folder}", entry.name):
                yield path
            else:
                self._pass_over(path)

    def _entries(self, folder: str) -> list[os.DirEntry]:
        """Sorted, without those that start with a dot."""
        try:
            with os.scandir(self.root / folder) as entries:
                return sorted((e for e in entries if e.name[0] != "."), key=lambda entry: entry.name)
        except OSError as error:
            self.unlisted.add(folder)
            self.problem(folder, f"cannot be read: {error.strerror}; check its permissions")
            return []

    def _check_class_name(self, path: str, name: str) -> None:
        self._check_line(path, name)
        if not is_utf8(name):
            self.problem(path, "a class folder whose name is not UTF-8; rename it")

    def _check_line(self, path: str, name: str) -> None:
        if "\t" in name or "\n" in name:
            self.problem(path, "its name holds a tab or a line break, which data.skip_list cannot; rename it")

    def _find_same_classes(self, split: str, classes: list[str]) -> None:
        names: dict[str, str] = {}
        folders: dict[_Identity, str] = {}
        # Links last, so that they are the ones to be reported.
        for name in sorted(classes, key=lambda name: (self.root / split / name).is_symlink()):
            same_name = names.setdefault(_folded(name), name)
            same_folder = folders.setdefault(_identity(self.root / split / name), name)
            if same_name != name:
                difference = "only in case, Unicode form or blanks"
                self.problem(f"{split}/{name}", f"differs from {split}/{same_name} {difference}; merge them")
            if same_folder != name:
                self.problem(f"{split}/{name}", f"the same folder as {split}/{same_folder}; remove the link")

    def _pass_over(self, path: str) -> None:
        """A file that training does not see: by intention, as lists beside the images, or an image misnamed."""
        try:
            with open_regular_file(f"{self.root}/{path}") as file:
                head = file.read(512)
        except OSError as error:
            self.problem(path, f"cannot be read, and training passes it over: {error.strerror}; remove it")
            return
        if _is_text(head):
            self.notes.append(Remark(path, "a text file, which training passes over"))
        else:
            allowed = ", ".join(IMAGE_SUFFIXES)
            self.problem(
                path, f"training passes it over, since its suffix is not {allowed}; rename or remove it"
            )


def _identity(folder: Path) -> _Identity:
    try:
        status = folder.stat()
    except OSError:  # gone since it was listed; listing it says so
        return (-1, hash(folder))
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_text(head: bytes) -> bool:
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False


def _folded(name: str) -> str:
    """Equal for names that some file systems and most people take for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).strip().casefold())
