"""What a split of a data set is to everything that reads it, wherever its images lie."""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Self

import numpy as np

from kdav_fast.data.reading_process import fill, open_range, too_short
from kdav_fast.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageSet(ABC):
    """One split: N images in a fixed order, so that a position 0..N-1 names an image."""

    root: Path
    """Where the data set lies: what `data.root` names."""
    split: str
    """`train`, `val` or `test`."""
    classes: tuple[str, ...]
    """Class names; a label is a position in it."""
    labels: np.ndarray
    """N class ids, int64."""
    remark: str | None = field(default=None, kw_only=True)
    """A line that a user shall read before a run begins, if there is anything to say."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, position: int) -> str:
        """What the image is called in messages and in `data.skip_list`, such as a path relative to `root`."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Hexadecimal; equal for equal images and labels in equal order, wherever `root` is."""

    @abstractmethod
    def select(self, positions: np.ndarray) -> Self:
        """The same set with only these images, in this order. All classes stay."""


class Places(NamedTuple):
    """Where the bytes of N images are."""

    paths: list[str]
    """Of the files."""
    starts: np.ndarray
    """First bytes in them, int64."""
    sizes: np.ndarray
    """Bytes, int64; -1 for a file to its end."""


class EncodedImages(ImageSet):
    """Images as files: JPEG, PNG and others."""

    @abstractmethod
    def places(self, positions: np.ndarray) -> Places:
        """Where some images are; no file is looked at."""

    @abstractmethod
    def open(self, position: int) -> BinaryIO:
        """A file object (read, seek, tell, close) of one image's bytes, at its start.

        Raises:
            OSError: it cannot be opened.
        """

    def read(self, position: int) -> np.ndarray:
        """All bytes of one image, uint8. Called from many threads at once.

        Raises:
            OSError: it cannot be read.
        """
        (path,), (start,), (size,) = self.places(np.array([position]))
        descriptor, room = open_range(path, size)
        try:
            content = np.empty(room, np.uint8)
            got = fill(memoryview(content), descriptor, start)
        finally:
            os.close(descriptor)
        if got < size:
            raise too_short(path)
        return content[:got]

    @abstractmethod
    def byte_sizes(self) -> np.ndarray:
        """N int64; -1 for an image that is not there."""

    @abstractmethod
    def signature(self, position: int) -> str:
        """Changes when the image does, at the price of one `stat`: size and modification time.

        Raises:
            OSError: there is no such file.
        """


@dataclass(frozen=True, eq=False)
class PixelImages(ImageSet):
    """Decoded images of one size in memory."""

    pixels: Tensor
    """N x H x W x 3, uint8, RGB, on the CPU or on a GPU."""

    def name(self, position: int) -> str:
        return f"{self.split} image {position}"

    @cached_property
    def digest(self) -> str:
        content = hashlib.sha256(self.pixels.cpu().numpy().tobytes())
        content.update(self.labels.tobytes())
        return content.hexdigest()

    def select(self, positions: np.ndarray) -> Self:
        return replace(self, pixels=self.pixels[positions], labels=self.labels[positions])


def take_subset(images: ImageSet, count: int, seed: int, after: int = 0) -> ImageSet:
    """The first `count` images of a seeded permutation, or those after the first `after`, in the order of `images`.

    All classes stay, even one that lost every image; positions count within the subset.

    Raises:
        InputError: `images` has fewer than `count`.
    """
    if after + count > len(images):
        beside = f", {after} of them in another subset" if after else ""
        raise InputError(
            f"data.train_subset is {count} but the {images.split} images in {images.root} are {len(images)}{beside}; "
            "lower it"
        )
    chosen = np.random.default_rng(seed).permutation(len(images))[after : after + count]
    return images.select(np.sort(chosen))


def printable(name: str) -> str:
    r"""A file name as a line can hold it: bytes that are no UTF-8, tabs and line breaks become \xNN."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c >= " " else f"\\x{ord(c):02x}" for c in text)


def is_utf8(name: str) -> bool:
    """Whether a name from the file system is valid UTF-8: else it holds surrogate escapes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class ByteRange(io.RawIOBase):
    """`size` bytes of a file from `start` on, as a file of its own. Closes the file with itself."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if position < 0:
            raise ValueError(f"negative seek value {position}")  # before the start lies another image
        self._at = position
        return position

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._start + self._at)
        got = self._file.readinto(memoryview(buffer)[:wanted])
        self._at += got
        return got

    def close(self) -> None:
        self._file.close()
        super().close()
