"""Sizes that headers say: against Pillow, of every format that reaches DALI as it is."""

import io

import numpy as np
import pytest
from PIL import Image

from kdav_fast.data.image_header import size_in_header

FORMS = {
    "jpeg": ("JPEG", {}),
    "progressive": ("JPEG", {"progressive": True}),
    "with metadata": ("JPEG", {"icc_profile": bytes(200_000), "comment": b"\xff\xc0" * 40}),
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "webp": ("WEBP", {}),
    "lossless webp": ("WEBP", {"lossless": True}),
    "extended webp": ("WEBP", {"icc_profile": bytes(50)}),
    "ppm": ("PPM", {}),
}


def content_of(form: str, height=37, width=301) -> bytes:
    kind, options = FORMS[form]
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(37, 301), (301, 37), (1, 1)])
def test_size(form, size):
    assert size_in_header(memoryview(content_of(form, *size))) == size


def test_rotation_is_ignored():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(file, "JPEG", exif=exif)
    assert size_in_header(memoryview(file.getvalue())) == (20, 30)


def test_fill_bytes_before_a_marker():
    content = content_of("jpeg")
    padded = content[:2] + b"\xff\xff" + content[2:]
    assert size_in_header(memoryview(padded)) == (37, 301)


def test_a_bmp_that_begins_at_its_top():
    content = bytearray(content_of("bmp"))
    content[22:26] = (-37).to_bytes(4, "little", signed=True)
    assert size_in_header(memoryview(content)) == (37, 301)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_ends_in_its_header_has_no_size(form):
    content = content_of(form)
    for length in range(9):
        assert size_in_header(memoryview(content[:length])) is None


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xda\0\2", b"\xff\xd8" + bytes(9)]
)
def test_what_has_no_frame_has_no_size(content):
    assert size_in_header(memoryview(content)) is None
