"""Find images that cannot be used before training does: it stops at the first one it meets."""

import contextlib
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from kdav_fast.data.cache import cache_folder
from kdav_fast.data.checks.defects import examine
from kdav_fast.data.image_set import EncodedImages, ImageSet, printable
from kdav_fast.errors import InputError, listed
from kdav_fast.runtime.files import write_cached
from kdav_fast.runtime.progress_bar import ProgressBar

_CHUNK = 256  # images a task of the thread pool: one at a time costs more in bookkeeping than in reading
DECODING_CHUNK = 16  # decoding is slow, and the bar shall move
_READERS = 16
T = TypeVar("T")


def check_images(
    images: ImageSet, max_pixels: int, decode: bool = True, workers: int | None = None, progress: bool = True
) -> None:
    """Scan all images of a split for empty, truncated, foreign, too large and damaged ones.

    A clean scan is remembered under names, sizes and modification times, so that the next one only asks for
    those. Decoded images need no check. One process a machine or job is enough: the caller scans on rank 0 and
    lets the others wait.

    Args:
        images: the split to scan.
        max_pixels: larger images are defects.
        decode: decode every image once; else a few KiB are read of each, and damage inside is not found.
        workers: threads. Default: 16, since they may wait for the file system, or as many as cores if these are more.
        progress: show a bar on stderr once the scan has taken two seconds.

    Raises:
        InputError: names the first defective images, what is wrong with them, and how many there are.
    """
    if not isinstance(images, EncodedImages):
        return
    workers = workers or max(_READERS, len(os.sched_getaffinity(0)))
    record = clean_record(images, max_pixels, decode, workers)
    if record.exists():
        return
    bar = ProgressBar(
        total=len(images),
        desc=f"{'decoding' if decode else 'looking at'} {images.split} once",
        unit="image",
        delay=2,
        disable=None if progress else True,
    )
    with bar:
        look = partial(examine, images, max_pixels=max_pixels, decode=decode)
        found = scan(images, look, workers, bar, DECODING_CHUNK if decode else _CHUNK)
        defects = [_named(images, i, finding.defect) for i, finding in enumerate(found) if finding.defect]
    if defects:
        raise defects_error(images, defects)
    remember_clean(record, images)


def clean_record(images: EncodedImages, max_pixels: int, decode: bool, workers: int) -> Path:
    """The file that is there if these images, as they are now, were found sound."""
    state = hashlib.sha256(os.fsencode(f"{images.root.resolve()}\0{max_pixels} {decode}\n"))
    for line in scan(images, partial(_signature_line, images), workers, None):
        state.update(line)
    return cache_folder() / "clean-scans" / f"{state.hexdigest()}.json"


def remember_clean(record: Path, images: EncodedImages) -> None:
    """Let `check_images` pass over a split that was as `record` says, and found sound, from now on."""
    content = {"root": printable(str(images.root)), "images": len(images)}
    with contextlib.suppress(OSError):  # the record only saves time: without a writable cache, scan again
        write_cached(record, json.dumps(content).encode())


def scan(
    images: ImageSet, examine: Callable[[int], T], workers: int, bar: ProgressBar | None, chunk: int = _CHUNK
) -> Iterator[T]:
    """What `examine` finds at every position, in order. Threads that are no longer waited for stop at once.

    Args:
        images: whose positions.
        examine: called in several threads.
        workers: how many.
        bar: counts the images that are done.
        chunk: images that a thread takes at a time.
    """
    given_up = threading.Event()

    def examine_all(positions: range) -> list[T]:
        return [examine(position) for position in positions if not given_up.is_set()]

    parts = [range(len(images))[start : start + chunk] for start in range(0, len(images), chunk)]
    pool = ThreadPoolExecutor(workers)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # such as damaged EXIF data, which nobody uses
            for part, found in zip(parts, pool.map(examine_all, parts), strict=True):
                yield from found
                if bar is not None:
                    bar.update(len(part))
    finally:
        given_up.set()
        pool.shutdown(wait=False, cancel_futures=True)


def decoding_defects(images: ImageSet, positions: Iterable[int]) -> list[str]:
    """Decode some images completely; a list of `NAME (what is wrong)`, empty if all are sound."""
    if not isinstance(images, EncodedImages):
        return []
    found = ((i, examine(images, i, decode=True).defect) for i in sorted(set(positions)))
    return [_named(images, i, defect) for i, defect in found if defect]


def defects_error(images: ImageSet, defects: list[str], most: int = 5) -> InputError:
    """The error that names the first `most` of some defective images."""
    return InputError(
        f"{len(defects)} of {len(images)} images in {images.root} cannot be used: {listed(defects, most)}; replace "
        "or remove them, or leave them out by data.skip_list, which 'kdav data check --quarantine' writes"
    )


def _named(images: EncodedImages, position: int, defect: str) -> str:
    return f"{printable(images.name(position))} ({defect})"


def _signature_line(images: EncodedImages, position: int) -> bytes:
    try:
        signature = images.signature(position)
    except OSError:
        signature = "missing"  # the check that follows says why
    return os.fsencode(f"{images.name(position)}\0{signature}\n")
