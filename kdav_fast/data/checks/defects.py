"""What is wrong with one encoded image, at the price of a few KiB of reading or of decoding all of it."""

import io
import re
from contextlib import suppress
from typing import BinaryIO, NamedTuple

from kdav_fast.config.data import PILLOW_MAX_PIXELS
from kdav_fast.data.checks.jpeg import jpeg_damage
from kdav_fast.data.formats import HEAD_BYTES, format_of, is_called, open_image
from kdav_fast.data.image_set import EncodedImages
from kdav_fast.errors import lack_of_means, one_line

_END_BYTES = 4096
_WIDE = ("F", "I")  # Pillow's modes of floats and 32-bit integers


class Finding(NamedTuple):
    """What one image is like."""

    defect: str | None
    """What is wrong with it: it cannot be used."""
    foreign: str | None = None
    """The format of its content where its suffix stands for another one. It is decoded by its content."""


def examine(
    images: EncodedImages, position: int, max_pixels: int | None = None, decode: bool = False
) -> Finding:
    """Look at one image of a split; see `image_defect`. That it cannot be read is a defect, too.

    Raises:
        InputError: this machine lacks what reading any file takes, such as a further open file.
    """
    try:
        with images.open(position) as file:
            kind = format_of(file.read(HEAD_BYTES))
            foreign = None if kind is None or is_called(images.name(position), kind) else kind
            return Finding(image_defect(file, max_pixels, decode), foreign)
    except OSError as error:
        if lack := lack_of_means(error):
            raise lack from None
        return Finding(f"cannot be read: {error.strerror or error}")


def image_defect(file: BinaryIO, max_pixels: int | None = None, decode: bool = False) -> str | None:
    """What is wrong with one image, or `None`. The content decides about the format, not the name.

    JPEG and PNG are checked at their ends and by their header, the other formats by their header.

    Args:
        file: the bytes; left open.
        max_pixels: the most an image may have; `None`: what can be opened at all.
        decode: also decode all of it, instead of only where its ends look wrong. Of what is damaged inside, that
            finds what breaks the format: see `jpeg_damage`; PNG has check sums, the others have none.

    Raises:
        OSError: the file cannot be read.
    """
    # Pillow reads headers in small pieces: from the buffer they cost 25 microseconds an image, else 60.
    buffered = io.BufferedReader(file, _END_BYTES)
    try:
        return _defect(buffered, max_pixels, decode)
    finally:
        buffered.detach()


def _defect(file: BinaryIO, max_pixels: int | None, decode: bool) -> str | None:
    size = file.seek(0, io.SEEK_END)
    if size == 0:
        return "empty"
    file.seek(0)
    kind = format_of(file.read(HEAD_BYTES))
    if kind is None:
        return "not an image of a known format"
    if kind in ("JPEG", "PNG"):
        file.seek(max(0, size - _END_BYTES))
        end = file.read(_END_BYTES)
        if kind == "JPEG":
            # Entropy-coded data holds neither marker, so a scan start (FFDA) behind the last end of image (FFD9)
            # means that this end was a thumbnail's. Bytes behind the end may hide it: only decoding can tell.
            decode = decode or end.rfind(b"\xff\xd9") <= end.rfind(b"\xff\xda")
        elif b"IEND" not in end:
            file.seek(0)
            if b"IEND" not in file.read():
                return "truncated"  # Pillow may overlook a missing end; DALI does not
    try:
        image = open_image(file, kind)
        width, height = image.size
        if width * height > (max_pixels or PILLOW_MAX_PIXELS):
            limit = f"data.max_pixels={max_pixels}" if max_pixels else f"the {PILLOW_MAX_PIXELS} Pillow opens"
            return f"{width} x {height} pixels, more than {limit}"
        if image.mode in _WIDE and kind == "TIFF":
            return "pixels of 32 bits, whose range nobody knows; save them with 8 or 16"
        damage = _decode(file, kind) if decode else None
    except Exception as error:  # the plugins raise whatever they stumble over
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file system
        damage = one_line(error)
    if damage is None:
        return None
    return "truncated" if re.search("truncated|premature end of jpeg", damage, re.I) else f"damaged: {damage}"


def _decode(file: BinaryIO, kind: str) -> str | None:
    """What is wrong inside, or `None`; raises what Pillow does."""
    if kind == "JPEG":
        file.seek(0)
        with suppress(ValueError):  # Pillow knows more kinds
            return jpeg_damage(file.read())
    open_image(file, kind).load()
    return None
