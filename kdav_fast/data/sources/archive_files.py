"""The files of a published archive, read from the archive itself or from the folder it was extracted to."""

import lzma
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

Files = dict[str, bytes]
"""Whole files by name, without folders."""


class DamagedError(Exception):
    """What is wrong with the content, to be put after the name of the archive or folder."""


@dataclass(frozen=True)
class Layout:
    """One way in which a data set is published."""

    archive: str
    """Name of the archive."""
    folder: str
    """Name of the folder in it."""
    names: str
    """The file with the class names."""
    splits: dict[str, tuple[str, ...]]
    """The files of `train` and of `test`."""
    read_names: Callable[[bytes], Sequence[str]]
    """Class names from the content of `names`."""
    read_images: Callable[[Files, tuple[str, ...]], tuple[np.ndarray, np.ndarray]]
    """Pixels (N x H x W x 3, uint8) and labels (N integers from 0) from files of one split; sizes are checked, the
    range of the labels is not."""

    def wanted(self, splits: Sequence[str]) -> tuple[str, ...]:
        """The files that hold some splits."""
        return (self.names, *(name for split in splits for name in self.splits[split]))


def read_files(source: Path, layouts: Sequence[Layout], splits: Sequence[str]) -> tuple[Layout, Files]:
    """Some splits of the first layout that is there as a whole.

    Args:
        source: a folder, or a tar archive, compressed or not, which is read as a stream up to the last file needed.
        layouts: those that may be there.
        splits: `train`, `test` or both.

    Raises:
        DamagedError: no layout is whole, or it is no archive.
        OSError: it cannot be read.
    """
    wanted = [layout.wanted(splits) for layout in layouts]
    read = _read_folder if source.is_dir() else _read_tar
    files = read(source, wanted)
    for layout, names in zip(layouts, wanted, strict=True):
        if files.keys() >= set(names):
            return layout, files
    most = max(wanted, key=lambda names: len(files.keys() & set(names)))
    raise DamagedError(f"it lacks {', '.join(name for name in most if name not in files)}")


def text_lines(content: bytes) -> list[str]:
    """The lines of a list of class names; empty ones fall away.

    Raises:
        DamagedError: it is no text.
    """
    try:
        return [line.strip() for line in content.decode().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise DamagedError("its class names are no text") from None


def _read_folder(folder: Path, wanted: Sequence[tuple[str, ...]]) -> Files:
    for names in wanted:
        if all((folder / name).is_file() for name in names):
            return {name: (folder / name).read_bytes() for name in names}
    # Only to tell what is missing.
    return {name: b"" for names in wanted for name in names if (folder / name).is_file()}


def _read_tar(path: Path, wanted: Sequence[tuple[str, ...]]) -> Files:
    files: Files = {}
    known = {name for names in wanted for name in names}
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if name in known and member.isfile():
                    files[name] = tar.extractfile(member).read()
                    if any(files.keys() >= set(names) for names in wanted):
                        break
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DamagedError(f"it is cut short or no tar archive ({error})") from None
    return files
