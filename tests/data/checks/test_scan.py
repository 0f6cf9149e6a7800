import io
import struct
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdav_fast.data.checks.defects import image_defect
from kdav_fast.data.checks.scan import check_images, decoding_defects, defects_error, scan
from kdav_fast.data.image_set import ByteRange, PixelImages
from kdav_fast.data.sources.folder import ImageFolder
from kdav_fast.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
PLENTY = 100_000_000


def encoded(kind: str, pixels=PIXELS, **options) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


JPEG, PNG = encoded("JPEG"), encoded("PNG")
THUMBNAIL = b"Exif\0\0" + b"\0" * 20 + encoded("JPEG", PIXELS[:8, :8])
MIDDLE_DAMAGED = PNG[: len(PNG) // 2] + bytes([PNG[len(PNG) // 2] ^ 0xFF]) + PNG[len(PNG) // 2 + 1 :]
KINDS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")


def defect(content: bytes, **options) -> str | None:
    file = io.BytesIO(content)
    found = image_defect(file, **options)
    assert not file.closed
    return found


@pytest.mark.parametrize(
    "content",
    [
        *map(encoded, KINDS),
        JPEG + b"\0" * 100,
        JPEG + b"\0" * 10_000,
        PNG + b"\0" * 10_000,
        JPEG + b"\xff\xda",
        encoded("JPEG", exif=THUMBNAIL),
        encoded("JPEG", exif=b"Exif\0\0" + b"\0" * 60_000),  # a header longer than what is read at once
    ],
)
@pytest.mark.parametrize("decode", [False, True])
def test_sound_images_pass(content, decode):
    assert defect(content, max_pixels=PLENTY, decode=decode) is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:-2], "truncated"),
        (encoded("JPEG", PIXELS[:20, :20], exif=THUMBNAIL)[:-200], "truncated"),
        (JPEG[:3], "truncated|damaged: "),
        (JPEG[:30], "truncated|damaged: "),
        (b"<html>not found</html>", "not an image"),
        (encoded("TGA"), "not an image"),
        (PNG[: len(PNG) // 2], "truncated"),
        (PNG[:-12], "truncated"),
        (PNG[:8], "truncated"),
        (PNG[:8] + PNG[-12:], "damaged: "),
        (encoded("BMP")[:10], "damaged: "),
        (encoded("TIFF")[:6], "damaged: |truncated"),
        (encoded("WEBP")[:16], "damaged: "),
    ],
)
def test_defects_are_found_at_the_ends_of_a_file(content, expected):
    found = defect(content, max_pixels=PLENTY)
    assert found is not None
    assert any(found.startswith(text) for text in expected.split("|")), found
    assert "\n" not in found


@pytest.mark.filterwarnings("ignore:::PIL")
@given(st.sampled_from(KINDS), st.data())
def test_a_file_cut_anywhere_gets_an_answer_and_decoding_finds_the_cut(kind, data):
    content = encoded(kind)
    cut = data.draw(st.integers(0, len(content) // 2))
    defect(content[:cut])
    assert defect(content[:cut], decode=True) is not None


@pytest.mark.filterwarnings("ignore:::PIL")
@given(st.binary(max_size=64), st.sampled_from([b"", *(encoded(kind)[:16] for kind in KINDS)]))
def test_any_bytes_get_an_answer(content, head):
    defect(head + content, decode=True)


def test_decoding_finds_what_the_ends_do_not_show():
    assert defect(MIDDLE_DAMAGED) is None
    assert defect(MIDDLE_DAMAGED, decode=True).startswith("damaged: ")


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_too_many_pixels_are_not_decoded(kind):
    content = encoded(kind)
    for decode in (False, True):
        assert defect(content, max_pixels=4800, decode=decode) is None
        expected = "80 x 60 pixels, more than data.max_pixels=4799"
        assert defect(content, max_pixels=4799, decode=decode) == expected


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("max_pixels", [PLENTY, None])
def test_a_decompression_bomb_is_a_defect_without_a_warning(max_pixels):
    size_at = JPEG.index(b"\xff\xc0") + 5
    bomb = JPEG[:size_at] + struct.pack(">HH", 20_000, 30_000) + JPEG[size_at + 4 :]
    limit = f"data.max_pixels={PLENTY}" if max_pixels else "the 178956970 Pillow opens"
    assert defect(bomb, max_pixels=max_pixels) == f"30000 x 20000 pixels, more than {limit}"


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_inside_another_file_is_looked_at_alone(tmp_path, kind):
    content = encoded(kind)
    (tmp_path / "shard").write_bytes(JPEG + content + PNG)
    for cut, expected in ((0, type(None)), (len(content) // 2, str)):
        with (tmp_path / "shard").open("rb", buffering=0) as shard:
            part = ByteRange(shard, len(JPEG), len(content) - cut)
            assert type(image_defect(part, decode=True)) is expected


def test_decoding_defects_names_each_image_once(numbered_split):
    folder = numbered_split(3)
    (folder.root / folder.name(1)).write_bytes(MIDDLE_DAMAGED)
    (folder.root / folder.name(2)).unlink()
    damaged, missing = decoding_defects(folder, [2, 1, 0, 1, 1])
    assert damaged.startswith("train/0001.png (damaged: ")
    assert missing == "train/0002.png (cannot be read: No such file or directory)"


def test_decoded_images_need_no_check():
    images = PixelImages(
        ".", "train", ("x",), np.zeros(2, np.int64), torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    )
    check_images(images, max_pixels=1)
    assert decoding_defects(images, [0, 1]) == []


def test_the_error_names_the_first_files_and_the_count(numbered_split):
    folder = numbered_split(700)
    for i in range(7):
        (folder.root / folder.name(i * 100)).write_bytes(b"")
    with pytest.raises(
        InputError, match=r"^7 of 700 images in .* train/0000\.png \(empty\), .* and 2 more;"
    ) as error:
        check_images(folder, PLENTY, workers=2, progress=False)
    assert "\n" not in str(error.value)


def test_the_error_says_what_to_do(numbered_split):
    message = str(defects_error(numbered_split(3), ["a (empty)"]))
    assert message.startswith("1 of 3 images in ")
    assert "cannot be used: a (empty); replace or remove them" in message
    assert "data.skip_list" in message
    assert "kdav data check" in message


def read_again(*args, **kwargs):
    raise AssertionError("the images were read again")


def test_a_clean_scan_is_remembered_until_a_file_or_the_limit_changes(numbered_split, cache, monkeypatch):
    folder = numbered_split(3)
    check_images(folder, PLENTY, workers=2)
    assert len(list(cache.rglob("*.json"))) == 1

    with monkeypatch.context() as context:
        context.setattr("kdav_fast.data.checks.scan.examine", read_again)
        check_images(folder, PLENTY, workers=2)
        with pytest.raises(AssertionError, match="read again"):
            check_images(folder, PLENTY - 1, workers=2)

    with pytest.raises(InputError, match=r"3 of 3 .*8 x 8 pixels, more than data.max_pixels=63"):
        check_images(folder, 63, workers=2)
    (folder.root / folder.name(1)).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(InputError, match=r"0001\.png \(empty\)"):
            check_images(folder, PLENTY, workers=2)


def test_a_cache_that_cannot_be_written_only_costs_time(numbered_split, cache):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    check_images(numbered_split(2), PLENTY, workers=1, progress=False)


@pytest.mark.parametrize("count", [0, 1, 4, 9])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_scan_keeps_the_order(tmp_path, count, workers):
    images = ImageFolder(tmp_path, "train", ("x",), np.zeros(count, np.int64), ("x.png",) * count)
    assert list(scan(images, lambda position: position**2, workers, None, chunk=4)) == [
        position**2 for position in range(count)
    ]


def test_a_scan_that_fails_examines_no_more(tmp_path):
    images = ImageFolder(tmp_path, "train", ("x",), np.zeros(1000, np.int64), ("x.png",) * 1000)
    examined = []

    def examine(position):
        examined.append(position)
        if len(examined) == 1:
            raise KeyboardInterrupt
        time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        list(scan(images, examine, 1, None, chunk=10))
    assert len(examined) < 500
