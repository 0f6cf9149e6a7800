import errno
import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdav_fast.data.sources.tar_shards import open_evaluation_shards, open_shards
from kdav_fast.errors import InputError
from tests.data.sources.small_shards import (
    BLOCK,
    FORMATS,
    images_of,
    sample,
    write_dali_index,
    write_data_set,
    write_shard,
)


@pytest.fixture
def root(tmp_path):
    return write_data_set(tmp_path / "shards")


def test_samples_come_in_the_order_of_the_shards(root):
    train, evaluation = open_shards(root)
    names = [f"train-0000.tar/{key}.jpg" for key in "ab"] + [f"train-0001.tar/{key}.jpg" for key in "cd"]
    assert [train.name(i) for i in range(4)] == names
    assert train.labels.tolist() == [3, 0, 1, 2]
    assert train.labels.dtype == np.int64
    assert [train.read(i).tobytes() for i in range(4)] == [f"image {key}".encode() for key in "abcd"]
    assert train.read(0).dtype == np.uint8
    assert train.classes == evaluation.classes == ("0", "1", "2", "3")
    assert (train.split, evaluation.split) == ("train", "val")
    assert images_of(evaluation) == {"val-0000.tar/e.jpg": b"image e"}


@pytest.mark.parametrize(
    ("train", "evaluation", "split"),
    [
        ("train-0.tar", "validation-0.tar", "val"),
        ("train/anything.tar", "val/0.tar", "val"),
        ("train/0.tar", "validation/0.tar", "val"),
        ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar", "val"),
        ("a_train_00.tar", "a_test_00.tar", "test"),
        ("train/0.tar", "test/0.tar", "test"),
    ],
)
def test_shards_are_found_in_every_layout(tmp_path, train, evaluation, split):
    write_shard(tmp_path / train, sample("a", 0))
    write_shard(tmp_path / evaluation, sample("b", 0))
    write_shard(tmp_path / "pretrain-0.tar", sample("c", 0))
    write_shard(tmp_path / Path(train).parent / "._train-0.tar", [])
    found = open_shards(tmp_path)
    assert [images.name(0) for images in found] == [f"{train}/a.jpg", f"{evaluation}/b.jpg"]
    assert [len(images) for images in found] == [1, 1]
    assert found[1].split == split


def test_validation_goes_before_test_and_no_shard_is_of_two_splits(root):
    write_shard(root / "test-0.tar", sample("t", 0))
    write_shard(root / "train-val-0.tar", sample("v", 0))
    train, evaluation = open_shards(root)
    assert len(train) == 4
    assert list(images_of(evaluation)) == ["train-val-0.tar/v.jpg", "val-0000.tar/e.jpg"]


def test_select_keeps_everything_together(root):
    train, _ = open_shards(root)
    chosen = train.select(np.array([3, 0]))
    assert images_of(chosen) == {"train-0001.tar/d.jpg": b"image d", "train-0000.tar/a.jpg": b"image a"}
    assert chosen.labels.tolist() == [2, 3]
    assert chosen.classes == train.classes
    assert len(chosen) == 2


def test_digest_follows_names_and_labels_but_not_the_place(root, tmp_path):
    digest = open_shards(root)[0].digest
    root.rename(tmp_path / "moved")
    root = tmp_path / "moved"
    assert open_shards(root)[0].digest == digest
    assert open_shards(root)[0].select(np.array([1, 0, 2, 3])).digest != digest
    digests = {digest}
    for time, files in enumerate((sample("c", 2) + sample("d", 1), sample("c", 2) + sample("f", 1))):
        os.utime(write_shard(root / "train-0001.tar", files), ns=(0, time))
        digests.add(open_shards(root)[0].digest)
    assert len(digests) == 3


def test_signature_follows_the_image_and_its_shard(root):
    train, _ = open_shards(root)
    signatures = [train.signature(i) for i in range(4)]
    assert len(set(signatures)) == 4
    os.utime(root / "train-0001.tar", ns=(0, 1))
    assert [train.signature(i) == signatures[i] for i in range(4)] == [True, True, False, False]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pil_opens_an_image_in_a_shard(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    write_shard(tmp_path / "val-0.tar", sample("a", 0) + sample("b", 0, content.getvalue()) + sample("c", 0))
    with open_evaluation_shards(tmp_path, ("x",)).open(1) as file, Image.open(file) as image:
        assert image.format == kind
        np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(content)))


def test_threads_read_at_once(tmp_path):
    generator = np.random.default_rng(0)
    files = {f"{i:03d}": generator.bytes(3000 + i) for i in range(100)}
    write_shard(tmp_path / "val-0.tar", [part for key in files for part in sample(key, 0, files[key])])
    images = open_evaluation_shards(tmp_path, ("x",))
    positions = generator.permutation(np.repeat(np.arange(100), 20))
    with ThreadPoolExecutor(16) as pool:
        for position, content in zip(positions, pool.map(images.read, positions), strict=True):
            assert content.tobytes() == files[f"{position:03d}"]


def test_a_shard_that_became_shorter_is_an_error_at_reading(root):
    train, _ = open_shards(root)
    os.truncate(root / "train-0000.tar", BLOCK + 3)
    with pytest.raises(OSError, match="shorter than its index says") as error:
        train.read(0)
    assert error.value.errno == errno.EIO
    assert error.value.filename == str(root / "train-0000.tar")
    assert train.read(2).tobytes() == b"image c"


def test_classes_txt_names_the_classes(root):
    (root / "classes.txt").write_text("\ufeffant\r\nbee\ncow bell\ndog\nelk\nfox\n\n")
    classes = ("ant", "bee", "cow bell", "dog", "elk", "fox")
    assert [images.classes for images in open_shards(root)] == [classes, classes]
    assert open_evaluation_shards(root, ("other",)).classes == classes


def test_evaluation_alone_takes_the_given_names_and_needs_no_training_shards(root):
    for shard in root.glob("train-*"):
        shard.unlink()
    images = open_evaluation_shards(root, tuple("pqrstu"))
    assert images.classes == tuple("pqrstu")
    with pytest.raises(InputError, match=r"val-0000.tar/e.jpg .* label 2, but there are only 2 class names"):
        open_evaluation_shards(root, tuple("pq"))


def _shard(*files, name="train-0000.tar"):
    return lambda root: write_shard(root / name, list(files))


def _unlink(root, *patterns):
    for pattern in patterns:
        for path in root.glob(pattern):
            path.unlink()


def _truncate(size):
    return lambda root: os.truncate(root / "train-0000.tar", size)


def _overwrite(root, start, content):
    with (root / "train-0000.tar").open("r+b") as file:
        file.seek(start)
        file.write(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (_unlink(root, "*"), root.rmdir()), r"data\.root .* is not a folder; give"),
        (lambda root: _unlink(root, "*"), r"has no val shards; name them val-\*\.tar or .* test-\*\.tar, or"),
        (
            lambda root: _unlink(root, "train*"),
            r"has no train shards; name them train-\*\.tar, or put .* train/",
        ),
        (lambda root: (root / "train-2.tar.gz").touch(), r"train-2\.tar\.gz is compressed, .*; replace"),
        (lambda root: (root / "val-2.tgz").touch(), r"val-2\.tgz is compressed"),
        (
            _shard(("a.cls", b"1"), ("a.txt", b"")),
            r"sample a of shard .*train-0000\.tar has no image \(\.jpg",
        ),
        (
            _shard(("k/a.jpg", b""), ("k/a.seg.cls", b"1")),
            r"sample k/a of shard .*0000\.tar has no \.cls; put",
        ),
        (_shard(("a.jpg", b""), ("b.jpg", b""), ("a.cls", b"1")), r"sample a .* has no \.cls; put the files"),
        (
            _shard(("a.jpg", b""), ("a.cls", b"cat\n")),
            r"of sample a in shard .*0000\.tar holds b'cat\\n'; it must",
        ),
        (_shard(("a.jpg", b""), ("a.cls", b"-1")), r"holds b'-1'"),
        (_shard(("a.jpg", b""), ("a.cls", b"")), r"holds b''"),
        (_shard(("a.jpg", b""), ("a.cls", b"1_0")), r"holds b'1_0'"),
        (_shard(("a.jpg", b""), ("a.cls", "٣".encode())), r"holds b'"),
        (_shard(("a.jpg", b""), ("a.cls", b"1" * 5000)), r"holds b'1{20}'; it must"),
        (_shard(("a.jpg", b""), ("a.cls", b"1000000")), r"0 to 999999"),
        (_shard(), r"train-0000\.tar holds no samples; put KEY\.jpg and KEY\.cls"),
        (_shard(("a", b""), (".jpg", b"")), r"train-0000\.tar holds no samples"),
        (
            lambda root: (root / "classes.txt").write_text("a\nb\nc"),
            r"0000\.tar/a\.jpg .* has label 3, but .* 3 class",
        ),
        (
            lambda root: (root / "classes.txt").write_text("a\n\nc"),
            r"line 2 of .*classes\.txt is empty; the name",
        ),
        (lambda root: (root / "classes.txt").write_bytes(b"\xff"), r"classes\.txt cannot be read: .*UTF-8"),
        (_truncate(0), r"train-0000\.tar is truncated or no uncompressed tar .*; copy or make it again"),
        (_truncate(300), r"is truncated"),
        (_truncate(BLOCK + 2), r"is truncated"),
        (_truncate(2 * BLOCK), r"is truncated"),
        (_truncate(4 * BLOCK), r"is truncated"),
        (_truncate(4 * BLOCK + 100), r"is truncated"),
        (lambda root: _overwrite(root, 4 * BLOCK, b"x" * 600), r"is truncated .*no end mark at byte 2048"),
        (
            lambda root: _overwrite(root, 0, b"\x1f\x8b\x08" + b"x" * 600),
            r"is truncated or no uncompressed tar",
        ),
        (
            lambda root: (_unlink(root, "train-0000.tar"), (root / "train-0000.tar").mkdir()),
            r"not a regular file",
        ),
    ],
)
def test_wrong_shards_are_refused_in_one_line(root, damage, message):
    damage(root)
    with pytest.raises(InputError, match=message) as error:
        open_shards(root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "places"),
    [
        (sample("a", 0, b"1") + sample("a", 1, b"2"), r"a\.jpg at byte 512 and a\.jpg at byte 2,560"),
        (sample("a", 0) + sample("b", 1) + sample("a", 1), r"a\.jpg at byte 512 and a\.jpg at byte 4,608"),
        ([("a.jpg", b""), ("a.JPG", b""), ("a.cls", b"0")], r"a\.jpg at byte 512 and a\.JPG at byte 1,024"),
        (
            [("a.jpg", b""), ("a.cls", b"0"), ("a.cls", b"1")],
            r"a\.cls at byte 1,024 and a\.cls at byte 2,048",
        ),
        (sample("a", 0) + sample("a", 1, field="png"), r"a\.cls at byte 1,536 and a\.cls at byte 3,584"),
    ],
    ids=["next to each other", "apart", "case", "label", "other format"],
)
@pytest.mark.parametrize("indexed", [False, True])
def test_samples_of_equal_keys_are_refused_and_both_named(root, files, places, indexed):
    shard = write_shard(root / "train-0000.tar", files)
    if indexed and len({name for name, _ in files}) == len(files):
        write_dali_index(shard, [[name for name, _ in files]])
    with pytest.raises(
        InputError, match=rf"train-0000\.tar holds more than one sample of the key a \({places}\)"
    ):
        open_shards(root)


def test_shards_may_number_their_samples_alike(tmp_path):
    for number in range(2):
        files = sample("0", number, b"first of %d" % number) + sample("1", 1, b"second of %d" % number)
        write_shard(tmp_path / f"train-{number}.tar", files)
    write_shard(tmp_path / "val-0.tar", sample("0", 0))
    assert len(open_shards(tmp_path)[0]) == 4


@pytest.mark.parametrize("copy", [os.symlink, os.link, shutil.copy])
def test_a_shard_that_is_there_twice_is_refused(root, copy):
    copy(root / "train-0000.tar", root / "train-0002.tar")
    with pytest.raises(
        InputError, match=r"shards train-0000\.tar and train-0002\.tar in .* hold the same images"
    ):
        open_shards(root)


def test_a_label_beyond_the_others_is_a_question(root):
    shard = write_shard(root / "train-0001.tar", sample("c", 1) + sample("d", 2) + sample("x", 999999))
    said = r"train-0001\.tar/x\.jpg in .* has label 999999, .* hold no image of 4, 5, 6, 7, 8 and 999,990 more; correct"
    with pytest.raises(InputError, match=said):
        open_shards(root)
    write_shard(shard, sample("c", 1) + sample("d", 2))
    write_shard(root / "val-0000.tar", sample("e", 5))
    with pytest.raises(
        InputError, match=r"val-0000\.tar/e\.jpg in .* has label 5, .* no image of 4, 5; correct"
    ):
        open_shards(root)
    (root / "classes.txt").write_text("\n".join("abcdef"))
    assert open_shards(root)[1].classes == tuple("abcdef")


def test_class_names_that_cannot_be_meant(root):
    (root / "classes.txt").write_text("\n".join(f"class {i}" for i in range(41)))
    with pytest.raises(
        InputError, match=r"classes\.txt names 41 classes, but the training shards .* of only 4; give"
    ):
        open_shards(root)
    (root / "classes.txt").write_text("ant\nbee\ncow\n bee \ndog")
    with pytest.raises(InputError, match=r"lines 2 and 4 of .*classes\.txt are both 'bee'; give each"):
        open_shards(root)


def test_an_unreadable_folder_is_named(root, monkeypatch):
    def refuse(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match=r"folder .*shards cannot be read: Permission denied; check"):
        open_shards(root)


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_the_loaders_read_shards(make_loader, tmp_path, form):
    for split in ("train", "val"):
        for shard in range(3):
            files = []
            for grey in range(10 * shard, 10 * shard + 5):
                content = io.BytesIO()
                Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(content, "PNG")
                files += sample(f"{grey}", grey % 7, content.getvalue(), "png")
            write_shard(tmp_path / f"{split}-{shard}.tar", files, form)
    greys = torch.tensor([10 * shard + i for shard in range(3) for i in range(5)])
    for images in open_shards(tmp_path):
        for batch in make_loader(images, workers=2):
            expected = greys[batch.index]
            torch.testing.assert_close(batch.images, (expected / 255).view(-1, 1, 1, 1).expand(-1, 3, 8, 8))
            assert torch.equal(batch.labels, expected % 7)
