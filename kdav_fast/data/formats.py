"""Image formats, known by their content: what their files are called, and who decodes them."""

import io
import re
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile


class _Format(NamedTuple):
    head: re.Pattern[bytes]
    """What its files begin with."""
    suffixes: tuple[str, ...]
    plugin: type[ImageFile]
    """Pillow's. Not `Image.open`, which warns of large images or refuses them without saying how large they are."""
    same_by_dali: bool
    """Whether DALI decodes all of its files, silently, and to the pixels that Pillow gives."""


_FORMATS = {
    "JPEG": _Format(re.compile(rb"\xff\xd8\xff"), (".jpg", ".jpeg", ".jpe", ".jfif"), JpegImageFile, True),
    "PNG": _Format(re.compile(rb"\x89PNG\r\n\x1a\n"), (".png",), PngImageFile, True),
    "BMP": _Format(re.compile(rb"BM"), (".bmp",), BmpImageFile, True),
    "WEBP": _Format(re.compile(rb"RIFF....WEBP", re.DOTALL), (".webp",), WebPImageFile, True),
    # DALI takes other maxima than 255 for 255, and knows no text.
    "PPM": _Format(re.compile(rb"P[1-6]\s"), (".ppm", ".pgm", ".pbm", ".pnm"), PpmImageFile, False),
    # DALI prints errors for CMYK before it decodes that otherwise, and has other colours for Lab and grey with alpha.
    "TIFF": _Format(re.compile(rb"II[*+]\0|MM\0[*+]"), (".tif", ".tiff"), TiffImageFile, False),
    "GIF": _Format(re.compile(rb"GIF8[79]a"), (".gif",), GifImageFile, False),
    "AVIF": _Format(re.compile(rb"....ftyp(avif|avis|mif1)", re.DOTALL), (".avif",), AvifImageFile, False),
    "JPEG2000": _Format(
        re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"), (".jp2", ".j2k"), Jpeg2KImageFile, False
    ),
}
IMAGE_SUFFIXES = tuple(suffix for format in _FORMATS.values() for suffix in format.suffixes)
"""Of files that are decoded; upper and lower case alike. The content decides about the format."""
HEAD_BYTES = 16
"""What `format_of` needs of a file."""
_PLAIN = re.compile(rb"P[56]\s\d+\s\d+\s255\s")  # what DALI decodes of PPM


def format_of(head: bytes) -> str | None:
    """The format of a file that begins with these bytes, or `None`."""
    return next((kind for kind, format in _FORMATS.items() if format.head.match(head)), None)


def is_called(name: str, kind: str) -> bool:
    """Whether a file's name stands for this format; one without a suffix stands for any."""
    return "." not in name.rpartition("/")[2] or name.lower().endswith(_FORMATS[kind].suffixes)


def open_image(file: BinaryIO, kind: str) -> ImageFile:
    """Read the header of an image of this format; raises whatever Pillow's plugin stumbles over."""
    file.seek(0)
    return _FORMATS[kind].plugin(file, "")


def rgb(image: Image.Image) -> Image.Image:
    """As 8-bit RGB: of an animation the first frame, of 16 bits the high ones; alpha is dropped."""
    if image.mode.startswith("I"):
        # 16 bits of grey: Pillow would cut off what does not fit into 8, DALI keeps the high ones.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def for_dali(content: np.ndarray) -> np.ndarray:
    """A file's bytes as DALI decodes them to Pillow's pixels: as they are, or decoded here and packed as PPM.

    Raises:
        OSError: it cannot be decoded here.
    """
    kind = format_of(content[:HEAD_BYTES].tobytes())
    if kind is None or _FORMATS[kind].same_by_dali or _PLAIN.match(content[:64].tobytes()):
        return content
    try:
        pixels = rgb(open_image(io.BytesIO(content), kind))
    except Exception as error:  # the plugins raise whatever they stumble over
        raise OSError(f"{kind} cannot be decoded: {error}") from None
    packed = b"P6 %d %d 255\n" % pixels.size + pixels.tobytes()
    return np.frombuffer(bytearray(packed), np.uint8)
