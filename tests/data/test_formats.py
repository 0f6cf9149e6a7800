"""Every format and kind of pixels through both loaders; Pillow's own decoding is the truth."""

import io
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from kdav_fast.data.checks.scan import check_images
from kdav_fast.data.formats import IMAGE_SUFFIXES
from kdav_fast.data.sources.folder import open_folder
from kdav_fast.errors import InputError

SIZE = 24
Y, X = np.mgrid[:SIZE, :SIZE]
PICTURE = Image.fromarray(np.stack([X * 10, Y * 10, (X + Y) * 5], -1).astype(np.uint8))
TURNED = PICTURE.rotate(180)
GREY_16 = Image.fromarray((X * 2500).astype(np.uint16))
ALPHA = PICTURE.copy()
ALPHA.putalpha(Image.fromarray((Y * 10).astype(np.uint8)))
PALETTE = PICTURE.quantize(32)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def animated(image: Image.Image, kind: str, **options) -> bytes:
    return saved(image, kind, save_all=True, append_images=[TURNED.convert(image.mode)], **options)


RGB_BYTES = PICTURE.tobytes()
FILES = {
    "gif.gif": saved(PALETTE, "GIF"),
    "transparent.gif": saved(PALETTE, "GIF", transparency=3),
    "animated.gif": animated(PICTURE, "GIF"),
    "grey.gif": saved(PICTURE.convert("L"), "GIF"),
    "avif.avif": saved(PICTURE, "AVIF"),
    "alpha.avif": saved(ALPHA, "AVIF"),
    "animated.avif": animated(PICTURE, "AVIF"),
    "jpeg.jfif": saved(PICTURE, "JPEG"),
    "jpeg.JPE": saved(PICTURE, "JPEG"),
    "jpeg-without-suffix": saved(PICTURE, "JPEG"),
    "png-without-suffix": saved(PICTURE, "PNG"),
    "several.jpg": animated(PICTURE, "MPO"),
    "upper-case.JPG": saved(PICTURE, "JPEG"),
    "cmyk.tif": saved(PICTURE.convert("CMYK"), "TIFF"),
    "cmyk-lzw.tif": saved(PICTURE.convert("CMYK"), "TIFF", compression="tiff_lzw"),
    "cmyk-jpeg.tiff": saved(PICTURE.convert("CMYK"), "TIFF", compression="jpeg"),
    "ycbcr.tif": saved(PICTURE.convert("YCbCr"), "TIFF"),
    "grey-alpha.tif": saved(ALPHA.convert("LA"), "TIFF"),
    "palette.tif": saved(PALETTE, "TIFF"),
    "alpha.tif": saved(ALPHA, "TIFF"),
    "grey-16.tif": saved(GREY_16, "TIFF"),
    "bits.tif": saved(PICTURE.convert("1"), "TIFF", compression="group4"),
    "pages.tif": animated(PICTURE, "TIFF"),
    "turned.tif": saved(PICTURE, "TIFF", tiffinfo={274: 3}),
    "turned.jpg": saved(PICTURE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\10\0\1\1\22\0\3\0\0\0\1\0\3\0\0\0\0\0\0"),
    "grey-16.png": saved(GREY_16, "PNG"),
    "transparent.png": saved(PALETTE, "PNG", transparency=bytes(range(32))),
    "grey-alpha.png": saved(ALPHA.convert("LA"), "PNG"),
    "animated.png": animated(PICTURE, "PNG"),
    "animated.webp": animated(PICTURE, "WEBP", lossless=True),
    "alpha.webp": saved(ALPHA, "WEBP", lossless=True, exact=True),
    "text.ppm": b"P3\n24 24\n255\n" + b" ".join(b"%d" % value for value in RGB_BYTES),
    "few-levels.ppm": b"P6 24 24 31\n" + bytes(value // 8 for value in RGB_BYTES),
    "many-levels.ppm": b"P6 24 24 65535\n" + b"".join(struct.pack(">H", value * 257) for value in RGB_BYTES),
    "remark.ppm": b"P6\n# by hand\n24 24\n255\n" + RGB_BYTES,
    "grey.pgm": saved(PICTURE.convert("L"), "PPM"),
    "bits.pbm": saved(PICTURE.convert("1"), "PPM"),
    "palette.bmp": saved(PALETTE, "BMP"),
    "jpeg-2000.jp2": saved(PICTURE, "JPEG2000"),
    "jpeg-2000.jpg": saved(PICTURE, "JPEG2000"),
}


@pytest.fixture
def root(tmp_path):
    """Every file in train/a/ and one in val/a/."""
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
    for name, content in FILES.items():
        (tmp_path / "train/a" / name).write_bytes(content)
    (tmp_path / "val/a/0.gif").write_bytes(FILES["gif.gif"])
    return tmp_path


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def truth(content: bytes) -> np.ndarray:
    """Pillow's RGB of the first frame; 16 bits of grey are cut to their high ones."""
    image = Image.open(io.BytesIO(content))
    image.load()
    if image.mode.startswith("I"):
        return np.repeat((np.asarray(image) // 256).astype(np.uint8)[..., None], 3, -1)
    return np.asarray(image.convert("RGB"))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_both_loaders_decode_every_format_to_pillow_s_pixels_in_silence(root, make_loader, capfd):
    images = open_folder(root)[0]
    assert len(images) == len(FILES)
    check_images(images, 100_000_000, progress=False)
    (batch,) = make_loader(images, size=SIZE, batch_size=len(images))
    pixels = (batch.images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    for path, found in zip(images.paths, pixels, strict=True):
        expected = truth(FILES[path.rpartition("/")[2]])
        assert np.abs(found.astype(int) - expected).max() <= 1, path
    assert "rror" not in capfd.readouterr().err


def test_a_resident_set_takes_them_too(root, make_loader):
    """Through random crops, which decode in another way."""
    from kdav_fast.data.preprocessing import RandomResizedCrop

    loader = make_loader(open_folder(root)[0], crop=RandomResizedCrop((0.5, 1.0), (0.75, 1.33)))
    assert sum(int(batch.valid.sum()) for batch in loader) == len(FILES)


@pytest.mark.parametrize("name", ["cut.gif", "cut.avif", "cut.tif", "cut.jp2", "cut.ppm"])
def test_cut_files_are_refused_by_name(root, name, make_loader):
    sound = {
        "gif": "gif.gif",
        "avif": "avif.avif",
        "tif": "cmyk.tif",
        "jp2": "jpeg-2000.jp2",
        "ppm": "text.ppm",
    }
    content = FILES[sound[name.split(".")[1]]]
    (root / "train/a" / name).write_bytes(content[: len(content) // 2])
    images = open_folder(root)[0]
    with pytest.raises(InputError, match=rf"cannot be used: train/a/{name} \("):
        check_images(images, 100_000_000, progress=False)
    with pytest.raises(InputError, match=rf"cannot be used: train/a/{name} \("):
        list(make_loader(images, batch_size=len(images)))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_refused(root, mode):
    (root / "train/a/wide.tif").write_bytes(saved(PICTURE.convert("L").convert(mode), "TIFF"))
    with pytest.raises(InputError, match=r"train/a/wide.tif \(pixels of 32 bits, whose range nobody knows"):
        check_images(open_folder(root)[0], 100_000_000, decode=False, progress=False)


def test_files_that_are_passed_over_are_mentioned(root):
    for number in range(4):
        (root / f"train/a/{number}.heic").touch()
    for name in ("labels.CSV", "LICENSE", ".DS_Store", "Thumbs.db", "binary"):
        (root / "train/a" / name).write_bytes(b"\1\2\3")
    train, evaluation = open_folder(root)
    assert len(train) == len(FILES)
    assert train.remark == (
        f"note: {root / 'train'}: 4 files are passed over by the suffix: train/a/0.heic, train/a/1.heic, "
        "train/a/2.heic and 1 more; rename or convert what is meant as an image"
    )
    assert evaluation.remark is None
    assert train.select(np.arange(2)).remark == train.remark


def test_suffixes_are_known_once():
    assert len(set(IMAGE_SUFFIXES)) == len(IMAGE_SUFFIXES)
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in IMAGE_SUFFIXES)


def test_a_pipe_without_suffix_is_not_waited_for(root):
    os.mkfifo(root / "train/a/pipe")
    assert len(open_folder(root)[0]) == len(FILES)
