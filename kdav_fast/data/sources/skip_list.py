"""The list of images that are left out: a line an image, its name, then perhaps a tab and the reason."""

import codecs
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kdav_fast.data.image_set import ImageSet
from kdav_fast.errors import InputError
from kdav_fast.runtime.files import write_whole


def write_skip_list(path: Path, defects: Iterable[tuple[str, str]]) -> None:
    """Write (name, what is wrong) pairs.

    Raises:
        InputError: the file cannot be written.
    """
    content = "".join(f"{name}\t{defect}\n" for name, defect in defects)
    try:
        write_whole(path, os.fsencode(content))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; give a file that can be written") from None


def leave_out(path: Path | None, *splits: ImageSet) -> tuple[ImageSet, ...]:
    """The splits without the images that a list names; a line may be of any split of the data set.

    Raises:
        InputError: the file cannot be read, none of its lines names an image of several splits, or no image of a
            split is left.
    """
    if path is None:
        return splits
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"data.skip_list {path} is a pipe or a device; give a file")
        # Spreadsheets and editors put a byte order mark first and end lines as Windows does.
        lines = re.split("\r?\n", os.fsdecode(path.read_bytes().removeprefix(codecs.BOM_UTF8)))
    except OSError as error:
        raise InputError(
            f"data.skip_list {path}: {error.strerror}; give the file that 'kdav data check --quarantine' wrote"
        ) from None
    skipped = {line.split("\t")[0] for line in lines} - {""}
    rest = []
    for images in splits:
        kept = np.array([i for i in range(len(images)) if images.name(i) not in skipped], np.int64)
        if len(kept) == 0:
            raise InputError(f"data.skip_list {path} leaves no image of {images.split}; shorten it")
        rest.append(images if len(kept) == len(images) else images.select(kept))
    if skipped and len(splits) > 1 and all(one is other for one, other in zip(rest, splits, strict=True)):
        raise InputError(
            f"no line of data.skip_list {path} names an image of this data set, such as "
            f"'{splits[0].name(0)}'; give the list that was written for it"
        )
    return tuple(rest)
