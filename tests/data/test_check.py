import io

import numpy as np
import pytest
from PIL import Image

from kdav_fast.data.check import check_images, decoding_defects, image_defect
from kdav_fast.data.folder import ImageFolder
from kdav_fast.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def encoded(kind: str, pixels=PIXELS, **options) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


JPEG, PNG = encoded("JPEG"), encoded("PNG")
THUMBNAIL = b"Exif\0\0" + b"\0" * 20 + encoded("JPEG", PIXELS[:8, :8])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jpg", JPEG),
        ("a.png", PNG),
        ("png-inside.jpg", PNG),
        ("short-tail.jpg", JPEG + b"\0" * 100),
        ("long-tail.jpg", JPEG + b"\0" * 10_000),
        ("long-tail.png", PNG + b"\0" * 10_000),
        ("tail-with-marker.jpg", JPEG + b"\xff\xda"),
        ("thumbnail.jpg", encoded("JPEG", exif=THUMBNAIL)),
        ("a.bmp", encoded("BMP")),
        ("a.ppm", encoded("PPM")),
        ("a.tif", encoded("TIFF")),
        ("a.webp", encoded("WEBP")),
    ],
)
def test_sound_images_pass(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert image_defect(tmp_path / name) is None
    assert image_defect(tmp_path / name, decode=True) is None


@pytest.mark.parametrize(
    ("name", "content", "defect"),
    [
        ("a.jpg", b"", "empty"),
        ("a.jpg", JPEG[: len(JPEG) // 2], "truncated"),
        ("a.jpg", JPEG[:-2], "truncated"),
        ("a.jpg", encoded("JPEG", PIXELS[:20, :20], exif=THUMBNAIL)[:-200], "truncated"),
        ("a.jpg", b"<html>not found</html>", "not an image"),
        ("a.jpg", encoded("GIF"), "not an image"),
        ("a.png", PNG[: len(PNG) // 2], "truncated"),
        ("a.png", PNG[:-12], "truncated"),
        ("a.png", PNG[:8], "truncated"),
        ("a.bmp", encoded("BMP")[:10], "damaged|not an image"),
    ],
)
def test_defects_are_found_at_the_ends_of_a_file(tmp_path, name, content, defect):
    path = tmp_path / name
    path.write_bytes(content)
    found = image_defect(path)
    assert found is not None
    assert any(found.startswith(text) for text in defect.split("|"))


def test_missing_files_are_defects(tmp_path):
    assert image_defect(tmp_path / "gone.png") == "cannot be read: No such file or directory"


def test_decoding_finds_what_the_ends_do_not_show(tmp_path):
    middle = bytearray(PNG)
    middle[len(PNG) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(middle)
    (tmp_path / "b.png").write_bytes(PNG)
    assert image_defect(tmp_path / "a.png") is None
    folder = ImageFolder(tmp_path, ".", ("x",), ("a.png", "b.png"), np.zeros(2, np.int64))
    (defect,) = decoding_defects(folder, [1, 0, 0])
    assert defect.startswith("a.png (damaged")


def test_the_error_names_the_first_files_and_the_count(numbered_split):
    folder = numbered_split(700)
    for i in range(7):
        (folder.root / folder.paths[i * 100]).write_bytes(b"")
    with pytest.raises(
        InputError, match=r"^7 of 700 images in .* train/0000\.png \(empty\), .* and 2 more;"
    ) as error:
        check_images(folder, workers=2, progress=False)
    assert "\n" not in str(error.value)


def test_a_clean_scan_is_remembered_until_a_file_changes(numbered_split, cache, monkeypatch):
    folder = numbered_split(3)
    check_images(folder, workers=2)
    assert len(list(cache.rglob("*.json"))) == 1

    with monkeypatch.context() as context:
        context.setattr("kdav_fast.data.check.image_defect", lambda path: "read again")
        check_images(folder, workers=2)

    (folder.root / folder.paths[1]).write_bytes(b"")
    with pytest.raises(InputError, match=r"0001\.png \(empty\)"):
        check_images(folder, workers=2)
    with pytest.raises(InputError, match=r"0001\.png \(empty\)"):
        check_images(folder, workers=2)


def test_a_cache_that_cannot_be_written_only_costs_time(numbered_split, cache):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    check_images(numbered_split(2), workers=1, progress=False)
