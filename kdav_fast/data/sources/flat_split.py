"""The classes of evaluation images that lie in one folder: a label file says which image is of which class."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdav_fast.data.image_set import printable
from kdav_fast.errors import InputError, listed

_IN_SPLIT = ("val_annotations.txt", "val.txt", "val_labels.txt")  # the first is Tiny-ImageNet's
_IN_ROOT = ("val.txt", "val_labels.txt")
_KAGGLE = "LOC_val_solution.csv"
_KAGGLE_HEADER = "ImageId,PredictionString"
_KAGGLE_LEVELS = 3  # Kaggle's ImageNet has it beside ILSVRC/, and train/ and val/ in ILSVRC/Data/CLS-LOC/
_COLUMNS = (2, 6)  # image and class; in Tiny-ImageNet's file also a box
_SEVERAL = -1


class _Line(NamedTuple):
    number: int
    image: str
    class_name: str


def find_label_file(root: Path, split: str) -> Path | None:
    """The label file that published data sets bring along: see `describe_label_files`. Only `val` has one."""
    if split != "val":
        return None
    places = [root / split / name for name in _IN_SPLIT] + [root / name for name in (*_IN_ROOT, _KAGGLE)]
    places += [folder / _KAGGLE for folder in root.resolve().parents[:_KAGGLE_LEVELS]]
    return next((place for place in places if place.is_file()), None)


def describe_label_files(split: str) -> str:
    """What `find_label_file` looks for, in words."""
    if split != "val":
        return f"none is looked for in {split}/"
    in_split = ", ".join(f"val/{name}" for name in _IN_SPLIT)
    return f"looked for {in_split}, {', '.join(_IN_ROOT)}, and {_KAGGLE} there or up to {_KAGGLE_LEVELS} folders above"


def read_labels(path: Path, images: Sequence[str], classes: tuple[str, ...]) -> np.ndarray:
    """The class id of each image from a label file.

    A line holds IMAGE and CLASS between blanks, a tab or a comma, and may go on as in Tiny-ImageNet's
    `val_annotations.txt`; Kaggle's `LOC_val_solution.csv` is known by its header. IMAGE is the end of a path, with or
    without suffix. CLASS is a class name, or the position 0, 1, ... in the sorted names; where a class is itself
    named by a number, names only.

    Args:
        path: the label file.
        images: N paths with `/`.
        classes: their names; an id is a position in it.

    Returns:
        N ids, int64.

    Raises:
        InputError: the file cannot be read, a line does not fit, or not every image has exactly one.
    """
    positions = _positions(images)
    known = _Classes(classes)
    labels = np.zeros(len(images), np.int64)
    line_of: dict[int, int] = {}
    absent = []
    for line in _lines(path):
        where = f"{path} line {line.number}"
        label = known.find(line.class_name, where)
        position = positions.get(line.image.removeprefix("./"))
        if position is None:
            absent.append(line.image)
        elif position == _SEVERAL:
            raise InputError(
                f"{where}: several images are called '{printable(line.image)}'; add folder or suffix"
            )
        elif position in line_of:
            raise InputError(
                f"{where}: '{printable(line.image)}' has a class from line {line_of[position]} already; remove one"
            )
        else:
            line_of[position] = line.number
            labels[position] = label
    _require_pairs(path, absent, [image for position, image in enumerate(images) if position not in line_of])
    return labels


def _require_pairs(path: Path, absent: list[str], unnamed: list[str]) -> None:
    if absent:
        raise InputError(
            f"{path} names {_quoted(absent)} but there is no such image; complete the folder or remove the lines"
        )
    if unnamed:
        raise InputError(
            f"{path} has no line for {_quoted(unnamed)}; add IMAGE CLASS lines or remove the images"
        )


def _positions(images: Sequence[str]) -> dict[str, int]:
    """Position of each image by every end of its path; an end that also fits without suffix gives way."""
    whole: dict[str, int] = {}
    bare: dict[str, int] = {}
    for position, image in enumerate(images):
        parts = image.split("/")
        for start in range(len(parts)):
            end = "/".join(parts[start:])
            for names, name in ((whole, end), (bare, end.rpartition(".")[0])):
                names[name] = _SEVERAL if name in names else position
    return bare | whole


class _Classes:
    """Finds the id of a class by its name, or by its place among the sorted names."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._ids = {name: label for label, name in enumerate(names)}
        # A number cannot say both a name and a place.
        self._by_place = None if any(_is_integer(name) for name in names) else sorted(names)

    def find(self, text: str, where: str) -> int:
        if text in self._ids:
            return self._ids[text]
        if self._by_place is None or not _is_integer(text):
            some = next(iter(self._ids))
            raise InputError(
                f"{where}: '{printable(text)}' is none of the {len(self._ids)} classes, such as '{some}'; "
                "correct the line"
            )
        if not 0 <= int(text) < len(self._by_place):
            raise InputError(
                f"{where}: class {text} is out of range 0 to {len(self._by_place) - 1}; count the sorted class names "
                "from 0"
            )
        return self._ids[self._by_place[int(text)]]


def _is_integer(text: str) -> bool:
    return re.fullmatch("-?[0-9]{1,18}", text) is not None


def _lines(path: Path) -> Iterator[_Line]:
    try:
        if not path.is_file():
            raise InputError(f"data.val_labels {path} is no file; give a text file with lines IMAGE CLASS")
        # File names need not be UTF-8, and spreadsheets put a byte order mark first.
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise InputError(f"data.val_labels {path} cannot be read: {error.strerror}; check it") from None
    is_kaggle = False
    for number, content in enumerate(re.split("\r\n|\r|\n", text), start=1):
        line = content.strip(" \t")
        if number == 1 and line == _KAGGLE_HEADER:
            is_kaggle = True
        elif line:
            columns = _columns(line)
            if len(columns) == 1 or not all(columns[:2]):
                raise InputError(
                    f"{path} line {number} is one column, not IMAGE CLASS (the ILSVRC devkit's numbers follow the "
                    "devkit's own order of classes); give a file with image names"
                )
            if len(columns) not in _COLUMNS:
                raise InputError(
                    f"{path} line {number} has {len(columns)} columns; write IMAGE CLASS, with a tab between them if "
                    "names hold commas or blanks"
                )
            yield _Line(number, columns[0], columns[1].split()[0] if is_kaggle else columns[1])


def _columns(line: str) -> list[str]:
    if "\t" in line:
        columns = re.split("\t+", line)
    else:
        columns = line.split(",") if "," in line else line.rsplit(" ", maxsplit=1)
    return [column.strip(" ") for column in columns]


def _quoted(names: Sequence[str]) -> str:
    return listed([f"'{printable(name)}'" for name in names], 3)
