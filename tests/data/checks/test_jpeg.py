"""What is found of the damage that decoders pass over in silence; the files are broken here, so the truth is known."""

import io

import numpy as np
import pytest
from PIL import Image

from kdav_fast.data.checks.defects import image_defect
from kdav_fast.data.checks.jpeg import jpeg_damage
from tests.data.checks.jpeg_files import damaged, data_start, jpeg, photograph

PICTURE = photograph(0)
FLAT = np.full((400, 400, 3), 255, np.uint8)
SOUND = {
    "colour": jpeg(PICTURE),
    "grey": jpeg(PICTURE, "L"),
    "CMYK": jpeg(PICTURE, "CMYK"),
    "RGB without a colour transform": jpeg(PICTURE, keep_rgb=True),
    "progressive": jpeg(PICTURE, progressive=True),
    "full colour": jpeg(PICTURE, subsampling=0, quality=100),
    "one line of colour for two": jpeg(PICTURE, subsampling=1),
    "restart markers": jpeg(PICTURE, restart_marker_blocks=3),
    "EXIF thumbnail": jpeg(PICTURE, exif=b"Exif\0\0" + bytes(100) + jpeg(PICTURE[:16, :16])),
    "zeros after the end": jpeg(PICTURE) + bytes(5000),
    "another file after the end": jpeg(PICTURE) + jpeg(FLAT, optimize=True),
    "one pixel": jpeg(PICTURE[:1, :1]),
    # The code of zeros only says "no more of this block" here: a flat picture is a long row of it.
    "flat, with codes of its own": jpeg(FLAT, optimize=True),
    "flat and progressive": jpeg(FLAT, progressive=True),
    "half flat, with codes of its own": jpeg(np.concatenate([FLAT, photograph(1, 200, 400)]), optimize=True),
    "half flat": jpeg(np.concatenate([photograph(1, 200, 400), FLAT])),
    "zeros before the end mark": jpeg(PICTURE)[:-2] + bytes(700) + b"\xff\xd9",
}


@pytest.mark.parametrize("content", SOUND.values(), ids=SOUND)
def test_sound_files_pass(content):
    assert jpeg_damage(content) is None
    assert image_defect(io.BytesIO(content), decode=True) is None


def test_flat_files_do_have_rows_of_zeros():
    for kind in ("flat, with codes of its own", "flat and progressive"):
        assert bytes(32) in SOUND[kind][data_start(SOUND[kind]) :]


@pytest.mark.parametrize(
    "kind",
    [
        "cut in half, end mark added",
        "cut anywhere, end mark added",
        "second half zeroed",
        "second half zeroed but for the end mark",
        "64 bytes zeroed",
        "512 bytes zeroed",
        "512 random bytes",
        "512 bytes lost",
        "60 bits flipped",
    ],
)
def test_gross_damage_is_found_in_every_file(kind):
    for content in damaged(kind):
        defect = image_defect(io.BytesIO(content), decode=True)
        assert defect is not None
        assert defect == "truncated" or defect.startswith("damaged: ")
        assert "\n" not in defect


def test_some_flipped_bits_are_found():
    """One bit may turn a code into another one of its length: no reader of the format can tell."""
    found = [image_defect(io.BytesIO(content), decode=True) for content in damaged("5 bits flipped", 60)]
    assert sum(defect is not None for defect in found) >= 20
    by_pillow = 0
    for content in damaged("5 bits flipped", 60):
        try:
            Image.open(io.BytesIO(content)).load()
        except OSError:
            by_pillow += 1
    assert by_pillow < 15  # what the check would find without libjpeg's warnings


def test_damage_is_named_as_libjpeg_names_it():
    assert jpeg_damage(next(damaged("cut in half, end mark added"))) == "premature end of data segment"
    sound = jpeg(PICTURE)
    assert jpeg_damage(sound[:-2] + b"abc" * 9 + sound[-2:]).endswith(" extraneous bytes before marker 0xd9")
    assert jpeg_damage(sound[:-2]) == "Premature end of JPEG file"
    restarts = SOUND["restart markers"]
    assert "found marker 0xd1 instead of RST0" in jpeg_damage(restarts.replace(b"\xff\xd0", b"\xff\xd1", 1))


def test_zeroed_blocks_are_found_where_decoding_ends_right_by_chance():
    first = data_start(SOUND["grey"])
    only_by_zeros = []
    for at in range(first, len(SOUND["grey"]) - 100, 7):
        content = SOUND["grey"][:at] + bytes(64) + SOUND["grey"][at + 64 :]
        only_by_zeros.append("zero bytes in the middle" in jpeg_damage(content))
    assert any(only_by_zeros)


@pytest.mark.parametrize(
    "header",
    [
        lambda content: content.replace(b"JFIF\0\1\1", b"JFIF\0\7\7"),  # an unknown revision
        # An old encoder's way to begin a scan: coefficients 0 to 0.
        lambda content: content[: data_start(content) - 2] + b"\0" + content[data_start(content) - 1 :],
    ],
)
def test_remarks_about_headers_are_no_damage(header):
    content = header(jpeg(PICTURE))
    assert content != jpeg(PICTURE)
    assert image_defect(io.BytesIO(content), decode=True) is None


def test_any_cut_of_the_headers_gets_an_answer():
    for end in range(2, data_start(SOUND["grey"]) + 4):
        assert image_defect(io.BytesIO(SOUND["grey"][:end] + b"\xff\xd9"), decode=True) is not None
