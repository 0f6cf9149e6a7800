"""How large an image is, from its file's header. For the process that reads: with the standard library alone."""

import re
import struct

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_PPM = re.compile(rb"P[1-6]\s+(\d+)\s+(\d+)\s")
_HEAD = 64  # bytes that all but a JPEG need
# JPEG markers: those that begin a frame, which says the size; those that stand alone; the start of the data.
_FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))
_SCAN = 0xDA


def size_in_header(content: memoryview) -> tuple[int, int] | None:
    """Height and width in pixels of a JPEG, PNG, BMP, WebP or PPM file, `None` where they cannot be found.

    Args:
        content: the whole file. Rotation by EXIF is ignored.
    """
    try:
        size = _of_jpeg(content) if content[:2] == _JPEG else _of_head(bytes(content[:_HEAD]))
    except (IndexError, struct.error):  # the file ends too early
        return None
    return size if size and min(size) > 0 else None


def _of_jpeg(content: memoryview) -> tuple[int, int] | None:
    at = 2
    while content[at] == 0xFF:
        kind = content[at + 1]
        if kind in _FRAMES:
            return struct.unpack_from(">HH", content, at + 5)
        if kind == _SCAN:
            return None
        if kind == 0xFF:  # before a marker there may be any number of these
            at += 1
        elif kind in _ALONE:
            at += 2
        else:
            at += 2 + (content[at + 2] << 8 | content[at + 3])
    return None


def _of_head(head: bytes) -> tuple[int, int] | None:
    if head.startswith(_PNG):
        width, height = struct.unpack_from(">II", head, 16)
    elif head.startswith(b"BM"):
        old = struct.unpack_from("<I", head, 14) == (12,)
        width, height = struct.unpack_from("<HH" if old else "<ii", head, 18)
    elif head.startswith(b"RIFF"):
        width, height = _of_webp(head)
    elif found := _PPM.match(head):
        width, height = map(int, found.groups())
    else:
        return None
    return abs(height), width  # a BMP that begins at its top has a negative height


def _of_webp(head: bytes) -> tuple[int, int]:
    kind = head[12:16]
    if kind == b"VP8X":
        return tuple(int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return tuple(side & 0x3FFF for side in struct.unpack_from("<HH", head, 26))
