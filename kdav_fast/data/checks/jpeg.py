"""Damage to a JPEG that decoders decode past: what libjpeg warns of, and zeros where a picture cannot have them."""

import re
from typing import NamedTuple

import simplejpeg

_START_OF_SCAN = 0xDA
_BASELINE = (0xC0, 0xC1)
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_TABLES = 0xC4
_END = b"\xff\xd9"
# The next marker but restarts (FFD0 to FFD7); FF00 stands for a byte FF of the data.
_AFTER_SCAN = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")
# libjpeg's other warnings are of headers that it knows better than: an unknown JFIF revision or Adobe transform.
_DAMAGE = re.compile(r"Corrupt JPEG data|Premature end of JPEG file|Inconsistent progression sequence")
_BEFORE_END = "extraneous bytes before marker 0xd9"
_ZEROS = bytes(32)
_END_OF_BLOCK = 0


def jpeg_damage(content: bytes) -> str | None:
    """What is wrong with the picture in a JPEG file, or `None`. All of its data are decoded, but to grey only.

    A code has 2 to 16 bits and no check sum, so a flipped bit turns it into other codes. Where these end elsewhere
    than the picture does, libjpeg says so, and decodes on. Where they do not, nobody can tell.

    Args:
        content: the whole file, from `FFD8` on.

    Raises:
        ValueError: libjpeg-turbo does not decode such a file, or found what is no damage. Others may judge it.
    """
    damage = _damage(content)
    # Zeros between a whole picture and its end mark are how some cameras fill up their blocks.
    if damage and damage.endswith(_BEFORE_END) and _damage(_without_padding(content)) is None:
        return None
    return damage


def _damage(content: bytes) -> str | None:
    try:
        # All codes are read, but only an eighth of the grey pixels made of them.
        simplejpeg.decode_jpeg(content, colorspace="GRAY", min_factor=8, strict=True)
    except ValueError as error:
        if not _DAMAGE.match(str(error)):
            raise
        return str(error).removeprefix("Corrupt JPEG data: ")
    if _ZEROS in content and (zeros := _impossible_zeros(content)):
        return f"{zeros} zero bytes in the middle of the picture's data"
    return None


def _without_padding(content: bytes) -> bytes:
    """Without the zeros before the last end of image."""
    data, end, behind = content.rpartition(_END)
    picture = data.rstrip(b"\0")
    # Behind a byte FF, the first zero belongs to the data.
    return picture + b"\0" * picture.endswith(b"\xff") + end + behind


class _Scan(NamedTuple):
    start: int
    """Where its codes begin."""
    zeros_are_flat: bool
    """Whether a row of zero bits may stand for a flat part of the picture."""


def _impossible_zeros(content: bytes) -> int:
    """The length of the first row of zero bytes among the codes that no encoder would write there; 0 without one.

    Zero bits are the first code of each Huffman table, again and again. Unless it ends a block, that makes block after
    block with each of its 63 frequencies alike.
    """
    scan = _first_scan(content)
    if scan is None or scan.zeros_are_flat:
        return 0
    marker = _AFTER_SCAN.search(content, scan.start)
    first = content.find(_ZEROS, scan.start, marker.start() if marker else len(content))
    return 0 if first < 0 else len(re.compile(rb"\0+").match(content, first)[0])


def _first_scan(content: bytes) -> _Scan | None:
    """The only scan of most files; `None` for a progressive one, whose scans have rows of zeros of many meanings."""
    first_codes: dict[int, int] = {}  # of each AC table
    position = 2
    while content[position] == 0xFF:
        kind = content[position + 1]
        size = int.from_bytes(content[position + 2 : position + 4], "big")
        segment = content[position + 4 : position + 2 + size]
        if kind in _FRAMES and kind not in _BASELINE:
            return None
        if kind == _TABLES:
            first_codes |= _first_ac_codes(segment)
        if kind == _START_OF_SCAN:
            tables = {segment[2 + 2 * i] & 15 for i in range(segment[0])}
            return _Scan(position + 2 + size, all(first_codes.get(t) == _END_OF_BLOCK for t in tables))
        position += 2 + size
    return None


def _first_ac_codes(segment: bytes) -> dict[int, int]:
    """What the code of zeros only means in each AC table of a segment."""
    found = {}
    while segment:
        count = sum(segment[1:17])
        is_ac, table = segment[0] >> 4, segment[0] & 15
        if is_ac and count:
            found[table] = segment[17]
        segment = segment[17 + count :]
    return found
