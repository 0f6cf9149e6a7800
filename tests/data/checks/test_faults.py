"""What happens to each kind of odd or broken image: in the check at start, `kdav data check` and both loaders.

Odd images that both loaders decode are used as they are: a PNG called .jpg (a note of `kdav data check`), CMYK
JPEG, 16-bit PNG, names that are not UTF-8. Broken ones stop a run before its first step, and one that breaks later
stops it with the same message: its name, and what is wrong. Too large ones are stopped by the check alone.
"""

import errno
import io
import os
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from kdav_fast.cli import main
from kdav_fast.data.checks.scan import check_images
from kdav_fast.data.image_set import printable
from kdav_fast.data.sources.folder import open_folder
from kdav_fast.data.sources.skip_list import leave_out
from kdav_fast.data.sources.tar_shards import open_shards
from kdav_fast.errors import InputError
from tests.data.checks.jpeg_files import damaged

MAX_PIXELS = 100_000_000
COLOUR = (200, 100, 50)
GREY = (90, 90, 90)


def png(width: int, height: int, depth: int, colour_type: int, row: bytes) -> bytes:
    """A PNG file whose rows are all alike."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * height, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def flat_jpeg(mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (24, 16), COLOUR).convert(mode).save(content, "JPEG", quality=95)
    return content.getvalue()


FLAT_PNG = png(8, 8, 8, 2, bytes(COLOUR) * 8)
GREY_16 = png(8, 8, 16, 0, struct.pack(">H", GREY[0] * 257) * 8)
COLOUR_16 = png(8, 8, 16, 2, struct.pack(">3H", *(value * 257 for value in COLOUR)) * 8)
NOISE = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(NOISE, "JPEG")


@pytest.fixture
def root(tmp_path):
    """Eight sound images in train/a/, one in val/a/."""
    root = tmp_path / "set"
    for split, count in (("train", 8), ("val", 1)):
        (root / split / "a").mkdir(parents=True)
        for number in range(count):
            (root / split / "a" / f"{number}.png").write_bytes(FLAT_PNG)
    return root


def train_of(root):
    return open_folder(root)[0]


ODD = {
    "png-inside.jpg": (FLAT_PNG, COLOUR, "is a PNG, and is decoded as such"),
    "jpeg-inside.png": (flat_jpeg(), COLOUR, "is a JPEG, and is decoded as such"),
    "cmyk.jpg": (flat_jpeg("CMYK"), COLOUR, None),
    "grey-16.png": (GREY_16, GREY, None),
    "colour-16.png": (COLOUR_16, COLOUR, None),
    os.fsdecode(b"caf\xe9.png"): (FLAT_PNG, COLOUR, None),
}


@pytest.mark.parametrize("name", ODD, ids=printable)
def test_odd_images_are_used(root, name, make_loader, capsys):
    content, colour, note = ODD[name]
    (root / "train/a" / name).write_bytes(content)
    images = train_of(root)
    check_images(images, MAX_PIXELS, progress=False)
    assert main(["data", "check", str(root), "--decode"]) == 0
    *notes, _ = capsys.readouterr().out.splitlines()
    assert notes == ([f"train/a/{name}: note: {note}"] if note else [])
    position = images.paths.index(f"train/a/{name}")
    pixels = next(iter(make_loader(images, batch_size=9))).images[position] * 255
    np.testing.assert_allclose(
        pixels.permute(1, 2, 0),
        np.broadcast_to(colour, (8, 8, 3)),
        atol=3 if b"\xff\xd8" in content[:2] else 1e-3,
    )


def link_to_itself(path: Path):
    path.symlink_to(path.name)


def unreadable(path: Path):
    path.write_bytes(FLAT_PNG)
    path.chmod(0)


BROKEN = {
    "truncated.jpg": (lambda path: path.write_bytes(NOISE.getvalue()[:-300]), "truncated"),
    "truncated.png": (lambda path: path.write_bytes(FLAT_PNG[: len(FLAT_PNG) // 2]), "truncated"),
    "zero-byte.jpg": (lambda path: path.touch(), "empty"),
    "text.jpg": (lambda path: path.write_text("not found"), "not an image of a known format"),
    "loop.jpg": (link_to_itself, "cannot be read: Too many levels of symbolic links"),
    "dangling.jpg": (lambda path: path.symlink_to("x"), "cannot be read: No such file or directory"),
    "pipe.jpg": (os.mkfifo, "cannot be read: not a regular file"),
    "device.jpg": (lambda path: path.symlink_to("/dev/zero"), "cannot be read: not a regular file"),
    "forbidden.png": (unreadable, "cannot be read: Permission denied"),
    os.fsdecode(b"\xff.jpg"): (lambda path: path.touch(), "empty"),
}


@pytest.fixture(params=BROKEN, ids=printable)
def broken(request, root):
    """A tree with a broken image; its printable name and what is wrong with it."""
    if request.param == "forbidden.png" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    make, defect = BROKEN[request.param]
    make(root / "train/a" / request.param)
    return f"train/a/{printable(request.param)}", defect


def refusal(action, *arguments, **options) -> str:
    """The one line that an action is refused with."""
    with pytest.raises(InputError) as error:
        action(*arguments, **options)
    text = str(error.value)
    del error  # it refers to this frame, which would keep a loader's workers
    assert "\n" not in text
    return text


def test_broken_images_stop_a_run_at_start(root, broken):
    message = refusal(check_images, train_of(root), MAX_PIXELS, progress=False)
    name, defect = broken
    assert f"1 of 9 images in {root} cannot be used: {name} ({defect});" in message


def test_broken_images_are_listed(root, broken, capsys):
    name, defect = broken
    assert main(["data", "check", str(root)]) == 2
    output = capsys.readouterr()
    assert output.out == f"{name}: {defect}\n"
    assert output.err.startswith(f"kdav: error: 1 problem in {root}: 10 images")


def test_broken_images_stop_the_loaders(root, broken, make_loader):
    message = refusal(list, make_loader(train_of(root), batch_size=2))
    name, defect = broken
    assert f"1 of 9 images in {root} cannot be used: {name} ({defect});" in message


INSIDE = {
    "cut-with-end-mark.jpg": next(damaged("cut in half, end mark added")),
    "zeroed-half.jpg": next(damaged("second half zeroed but for the end mark")),
    "zeroed-block.jpg": next(damaged("512 bytes zeroed")),
    "flipped.png": FLAT_PNG[:50] + bytes([FLAT_PNG[50] ^ 1]) + FLAT_PNG[51:],
}


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("split", ["train", "val"])
def test_damage_inside_stops_a_run_at_start(root, name, split, capsys):
    """Decoders pass over most of it in silence, so that the loaders cannot be the ones to find it."""
    (root / split / "a" / name).write_bytes(INSIDE[name])
    images = open_folder(root)[split == "val"]
    check_images(images, MAX_PIXELS, decode=False, progress=False)
    message = refusal(check_images, images, MAX_PIXELS, progress=False)
    assert f"1 of {len(images)} images in {root} cannot be used: {split}/a/{name} (damaged: " in message
    assert main(["data", "check", str(root), "--decode", "--quarantine", str(root / "skip")]) == 2
    assert capsys.readouterr().out.startswith(f"{split}/a/{name}: damaged: ")
    check_images(leave_out(root / "skip", images)[0], MAX_PIXELS, progress=False)


def test_damage_inside_a_shard_is_named(root, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for split, image in (("train", INSIDE["zeroed-block.jpg"]), ("val", flat_jpeg())):
        with tarfile.open(shards / f"{split}-0.tar", "w") as tar:
            for name, content in (("x.jpg", image), ("x.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    train, evaluation = open_shards(shards)
    check_images(evaluation, MAX_PIXELS, progress=False)
    assert "train-0.tar/x.jpg (damaged: " in refusal(check_images, train, MAX_PIXELS, progress=False)


def test_what_was_decoded_by_the_command_is_not_decoded_again(root, monkeypatch, capsys):
    assert main(["data", "check", str(root), "--decode"]) == 0
    monkeypatch.setattr("kdav_fast.data.checks.scan.examine", None)
    for images in open_folder(root):
        check_images(images, MAX_PIXELS, progress=False)
    (root / "train/a/0.png").write_bytes(flat_jpeg())
    with pytest.raises(TypeError):
        check_images(train_of(root), MAX_PIXELS, progress=False)


@pytest.mark.parametrize(("loader", "resident"), [("dali", False), ("torchvision", True)])
def test_training_and_evaluation_name_a_damaged_image_and_go_on_once_it_is_mended(
    root, loader, resident, tmp_path, capsys
):
    """Through the command line: one line, exit code 2, and the same command afterwards."""
    (root / "train/b").mkdir()
    (root / "val/b").mkdir()
    for place in ("train/b/0.jpg", "train/b/1.jpg", "val/b/0.jpg"):
        (root / place).write_bytes(INSIDE["cut-with-end-mark.jpg"])
    keys = {
        "data": {"name": "folder", "root": str(root), "loader": loader, "resident": resident}
        | {"image_size": 8, "crop": "none", "workers": 1},
        "model": {"name": "cifar:resnet8", "width": 0.25},
        "train": {"epochs": 1, "batch_size": 4},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "device": "cpu"} | keys))

    def train() -> str:
        code = main(["train", str(config)])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kdav: error")]
        assert code == (2 if lines else 0)
        return "".join(lines)

    assert "2 of 10 images" in (message := train())
    assert "train/b/0.jpg (damaged: premature end of data segment), train/b/1.jpg (damaged" in message
    for place in ("train/b/0.jpg", "train/b/1.jpg"):
        (root / place).write_bytes(flat_jpeg())
    assert "val/b/0.jpg (damaged: premature end of data segment)" in train()
    (root / "val/b/0.jpg").write_bytes(flat_jpeg())
    assert train() == ""
    (root / "val/b/0.jpg").write_bytes(INSIDE["zeroed-block.jpg"])
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "val/b/0.jpg (damaged: " in capsys.readouterr().err


def test_no_image_is_blamed_for_a_lack_of_open_files(root, monkeypatch):
    def no_further(*arguments):
        raise OSError(errno.EMFILE, "Too many open files")

    images, _ = open_folder(root)
    monkeypatch.setattr(type(images), "open", no_further)
    with pytest.raises(InputError, match="no further open file .*raise ulimit -n"):
        check_images(images, MAX_PIXELS, progress=False)


def test_an_image_that_vanishes_during_training_is_named(root, make_loader):
    for number in range(8, 60):
        shutil.copy(root / "train/a/0.png", root / f"train/a/{number:02d}.png")
    images = train_of(root)
    check_images(images, MAX_PIXELS, progress=False)
    batches = iter(make_loader(images, batch_size=2))
    next(batches)
    (root / "train/a/59.png").unlink()
    message = refusal(list, batches)
    assert "train/a/59.png (cannot be read: No such file or directory)" in message


@pytest.fixture
def huge(root):
    """20,000 x 20,000 pixels of one bit in 50 KB; 1.2 GB as RGB."""
    path = root / "train/a/huge.png"
    path.write_bytes(png(20_000, 20_000, 1, 0, bytes(2500)))
    return path


@pytest.mark.filterwarnings("error")
def test_a_huge_image_is_not_decoded(root, huge, capsys):
    defect = "20000 x 20000 pixels, more than data.max_pixels=100000000"
    message = refusal(check_images, train_of(root), MAX_PIXELS, progress=False)
    assert f"train/a/huge.png ({defect});" in message
    assert main(["data", "check", str(root), "--decode"]) == 2
    assert capsys.readouterr().out == f"train/a/huge.png: {defect}\n"


@pytest.mark.parametrize("loader_class", ["torchvision"], indirect=True)
def test_a_huge_image_that_comes_later_stops_the_torchvision_loader(root, huge, make_loader):
    """DALI, which knows no such limit, decodes it if the memory is there."""
    message = refusal(list, make_loader(train_of(root)))
    assert "train/a/huge.png (20000 x 20000 pixels, more than the 178956970 Pillow opens)" in message


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_link_to_a_folder_above_is_named(root, target, capsys):
    (root / "train/a/up").symlink_to(target)
    message = refusal(train_of, root)
    assert "train/a/up leads back to a folder above it" in message
    assert main(["data", "check", str(root)]) == 2
    assert capsys.readouterr().out.startswith("train/a/up: a link that leads back to a folder above it")
