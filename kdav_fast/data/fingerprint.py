"""What the images of a run are, in a few KiB: to tell whether a later start, or another host, has the same ones."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np

from kdav_fast.data.image_set import EncodedImages, ImageSet, PixelImages, printable

_SECTIONS = 512
_SAMPLED_BYTES = 64 * 2**20
_MOST_SAMPLED = 8  # images of a section
_END = 2**19  # of a larger image than two of these, only both ends are read
_THREADS = 16  # they wait for the file system most of the time

Fingerprint = dict[str, dict[str, Any]]
"""JSON values by split."""


def fingerprint(splits: Iterable[ImageSet]) -> Fingerprint:
    """What some splits hold, wherever their roots are and whenever their files were written.

    All names, labels, class names and sizes; the content of decoded images, and of files that of a fixed sample:
    as many as 64 MiB allow, at least 512 and at most 4,096 of each split, evenly spread. A change of equal size in
    a file outside the sample does not show. Besides, it costs one `stat` a file. That a file cannot be read counts
    as its content. Of several processes that share a disk, one is enough.
    """
    return {images.split: _of_split(images) for images in splits}


def difference(there: Fingerprint, here: Fingerprint) -> str | None:
    """How two fingerprints differ, such as "train has 90 images there and 91 here"; None if they are equal.

    Where the images differ, it names the first section of the split in which they do: one image of a split of at most
    512, else the first one of those that it is among.
    """
    if there.keys() != here.keys():
        return f"the splits are {', '.join(there)} there and {', '.join(here)} here"
    for split in there:
        one, other = there[split], here[split]
        if one["images"] != other["images"]:
            return f"{split} has {one['images']:,} images there and {other['images']:,} here"
        sections = list(zip(one["sections"], other["sections"], strict=True))
        # Content last: how much of it is read follows from the sizes.
        for kind, what in (
            ("names", "another name or label"),
            ("sizes", "another size"),
            ("content", "other content"),
        ):
            for before, now in sections:
                if before["first"] != now["first"]:
                    names = [printable(section["first"]) for section in (before, now)]
                    return f"{split} has {names[0]} there where it has {names[1]} here"
                if before[kind] != now[kind]:
                    return f"{_where(before)} has {what}"
        if one["classes"] != other["classes"]:
            return f"the classes of {split} are named otherwise"
    return None


def same_names(there: Fingerprint, here: Fingerprint, split: str) -> bool:
    """Whether a split has the same images with the same labels, whatever they show."""
    names = [
        [section["names"] for section in each.get(split, {}).get("sections", [])] for each in (there, here)
    ]
    return names[0] == names[1]


def _where(section: dict[str, Any]) -> str:
    name = printable(section["first"])
    return name if section["images"] == 1 else f"one of the {section['images']:,} images from {name} on"


def _of_split(images: ImageSet) -> dict[str, Any]:
    from kdav_fast.data.resident import (
        ResidentImages,
    )  # it loads torch, which most readers of this file do without

    if isinstance(images, ResidentImages):
        return _of_split(images.source)
    bounds = np.linspace(0, len(images), min(len(images), _SECTIONS) + 1).astype(int).tolist()
    sections = [range(*ends) for ends in pairwise(bounds)]
    sizes = images.byte_sizes() if isinstance(images, EncodedImages) else np.zeros(len(images), np.int64)
    mean = max(1, int(sizes.clip(0).mean()))
    sampled = min(_MOST_SAMPLED, max(1, _SAMPLED_BYTES // mean // len(sections)))

    def of_section(positions: range) -> dict[str, Any]:
        part = slice(positions.start, positions.stop)
        names = "\0".join(map(images.name, positions)).encode("utf-8", "surrogateescape")
        return {
            "first": images.name(positions.start),
            "images": len(positions),
            "names": _digest(names, images.labels[part].astype(np.int64).tobytes()),
            "sizes": _digest(sizes[part].astype(np.int64).tobytes()),
            "content": _content(images, positions, sampled),
        }

    with ThreadPoolExecutor(_THREADS) as pool:
        return {
            "images": len(images),
            "classes": _digest("\0".join(images.classes).encode("utf-8", "surrogateescape")),
            "sections": list(pool.map(of_section, sections)),
        }


def _content(images: ImageSet, positions: range, sampled: int) -> str:
    """Of all decoded images of a section, or of so many of its files."""
    if isinstance(images, PixelImages):
        return _digest(images.pixels[positions.start : positions.stop].cpu().numpy().tobytes())
    step = -(-len(positions) // sampled)
    return _digest(*(content_of(images, position) for position in positions[::step]))


def content_of(images: EncodedImages, position: int) -> bytes:
    """The bytes of an image; of a large one, both ends. Why it cannot be read, if it cannot."""
    try:
        with images.open(position) as file:
            size = file.seek(0, 2)
            file.seek(0)
            if size <= 2 * _END:
                return _read(file, size)
            head = _read(file, _END)
            file.seek(size - _END)
            return head + _read(file, _END)
    except OSError as error:
        return f"cannot be read: {error.errno}".encode()


def _read(file: Any, size: int) -> bytes:
    """`size` bytes, or those up to the file's end: one call may give fewer."""
    parts = []
    while size > 0 and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _digest(*parts: bytes) -> str:
    content = hashlib.blake2b(digest_size=8)
    for part in parts:
        content.update(len(part).to_bytes(8, "little"))
        content.update(part)
    return content.hexdigest()
