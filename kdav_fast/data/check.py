"""Find images that cannot be decoded before training does: DALI stops at the first one it meets."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from kdav_fast.data.cache import cache_folder, write_atomically
from kdav_fast.data.folder import ImageFolder
from kdav_fast.errors import InputError

_TAIL_BYTES = 4096
_CHUNK = 256  # files a task of the thread pool: one at a time costs more in bookkeeping than in reading


def check_images(folder: ImageFolder, workers: int = 16, progress: bool = True) -> None:
    """Scan all files of a split for empty, truncated and foreign ones; about 4 KiB are read of each.

    JPEG and PNG are checked at their first and last bytes, the other formats by their header. A clean scan
    is remembered under paths, sizes and modification times, so that the next one only asks for those.
    One process a machine or job is enough: the caller scans on rank 0 and lets the others wait.

    Args:
        folder: the split to scan.
        workers: threads; they wait for the file system most of the time, so more than there are cores.
        progress: show a bar on stderr once the scan has taken two seconds.

    Raises:
        InputError: names the first defective files, what is wrong with them, and how many there are.
    """
    with ThreadPoolExecutor(workers) as pool:
        state = hashlib.sha256(str(folder.root.resolve()).encode())
        for chunk in pool.map(_stat_chunk, _chunks(folder)):
            state.update(chunk.encode())
        record = cache_folder() / "clean-scans" / f"{state.hexdigest()}.json"
        if record.exists():
            return
        defects: list[str] = []
        with tqdm(
            total=len(folder),
            desc=f"checking {folder.split}",
            unit="image",
            delay=2,
            disable=None if progress else True,
        ) as bar:
            for chunk, found in zip(_chunks(folder), pool.map(_check_chunk, _chunks(folder)), strict=True):
                defects += found
                bar.update(len(chunk))
    if defects:
        raise defects_error(folder, defects)
    with contextlib.suppress(OSError):  # the record only saves time: without a writable cache, scan again
        write_atomically(record, json.dumps({"root": str(folder.root), "images": len(folder)}).encode())


def decoding_defects(folder: ImageFolder, positions: Iterable[int]) -> list[str]:
    """Decode some images completely; a list of `PATH (what is wrong)`, empty if all are sound."""
    paths = [folder.paths[position] for position in sorted(set(positions))]
    checked = ((path, image_defect(folder.root / path, decode=True)) for path in paths)
    return [f"{path} ({defect})" for path, defect in checked if defect]


def defects_error(folder: ImageFolder, defects: list[str], most: int = 5) -> InputError:
    """The error that names the first `most` of some defective images."""
    named = ", ".join(defects[:most]) + (f" and {len(defects) - most} more" if len(defects) > most else "")
    return InputError(
        f"{len(defects)} of {len(folder)} images in {folder.root} cannot be decoded: {named}; "
        "replace or remove them"
    )


def image_defect(path: Path, decode: bool = False) -> str | None:
    """What is wrong with one image file, or `None`.

    Args:
        path: the file; its content decides about the format, not its name.
        decode: also decode all of it, instead of only where its ends look wrong.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(16)
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read(_TAIL_BYTES)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if size == 0:
        return "empty"
    if head.startswith(b"\xff\xd8\xff"):
        # Entropy-coded data holds neither marker, so a scan start (FFDA) behind the last end of image (FFD9)
        # means that this end was a thumbnail's. Bytes behind the end may hide it: only decoding can tell.
        decode = decode or tail.rfind(b"\xff\xd9") <= tail.rfind(b"\xff\xda")
        return _decoding_defect(path, ("JPEG",)) if decode else None
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        if b"IEND" not in tail and b"IEND" not in path.read_bytes():
            return "truncated"  # PIL may overlook a missing end; DALI does not
        return _decoding_defect(path, ("PNG",)) if decode else None
    return _decoding_defect(path, ("BMP", "PPM", "TIFF", "WEBP"), decode)


def _decoding_defect(path: Path, formats: tuple[str, ...], decode: bool = True) -> str | None:
    """PIL's opinion of the header and, with `decode`, of the pixels."""
    try:
        with Image.open(path, formats=formats) as image:
            if decode:
                image.load()
    except Image.UnidentifiedImageError:
        return "not an image of a known format"
    except Exception as error:  # PIL's plugins raise whatever they stumble over
        return "truncated" if "truncated" in str(error) else f"damaged: {' '.join(str(error).split())}"
    return None


def _chunks(folder: ImageFolder) -> list[list[tuple[Path, str]]]:
    starts = range(0, len(folder), _CHUNK)
    return [[(folder.root, path) for path in folder.paths[start : start + _CHUNK]] for start in starts]


def _stat_chunk(chunk: list[tuple[Path, str]]) -> str:
    lines = []
    for root, path in chunk:
        try:
            status = (root / path).stat()
            lines.append(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n")
        except OSError:
            lines.append(f"{path}\0missing\n")  # the check that follows says why
    return "".join(lines)


def _check_chunk(chunk: list[tuple[Path, str]]) -> list[str]:
    checked = ((path, image_defect(root / path)) for root, path in chunk)
    return [f"{path} ({defect})" for path, defect in checked if defect]
