"""The one way in which files are written: whole or not at all, whatever stops the program or the machine."""

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path

TEMPORARY = ".tmp"
"""What ends the name of a file or folder that is not whole yet."""


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file and wait until the disk has it: a crash leaves the old file or the new one. Makes the folder.

    Args:
        path: written by one process at a time. What a crash left beside it is written over.
        content: text becomes UTF-8.

    Raises:
        OSError: the folder or the file cannot be written; the old file is as it was.
    """
    _replace(path, path.with_name(path.name + TEMPORARY), content, write_flushed)
    flush_folder(path.parent)


def write_cached(path: Path, content: bytes) -> None:
    """The same for what can be made again: any number of processes may write it at once, none waits for the disk.

    A crash of the machine may leave an empty file: whoever reads it must take that for none.
    """
    _replace(path, _beside(path), content, Path.write_bytes)


def write_whole_by_many(path: Path, content: bytes | bytearray) -> None:
    """As `write_whole`, but any number of processes may write it at once.

    What a killed one leaves beside it, `unfinished` finds.
    """
    _replace(path, _beside(path), content, write_flushed)
    flush_folder(path.parent)


def unfinished(folder: Path) -> list[Path]:
    """What processes left in a folder that were killed while they wrote, or what they are writing still."""
    return sorted(folder.glob(f".*.{'[0-9a-f]' * 32}{TEMPORARY}"))


def write_flushed(path: Path, content: bytes | bytearray | str) -> None:
    """Write a file in its place and wait until the disk has it; raises `OSError`."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder; raises `OSError`."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # from file systems that flush no folders, as some over a network
            raise
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    """A name that no other process takes."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")


def _replace(
    path: Path, temporary: Path, content: bytes | bytearray | str, write: Callable[[Path, bytes], object]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary, content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
