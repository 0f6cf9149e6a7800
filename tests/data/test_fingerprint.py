"""Which changes of a data set show, and what is said of them."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdav_fast.data import fingerprint as module
from kdav_fast.data.fingerprint import difference, fingerprint, same_names
from kdav_fast.data.image_set import PixelImages
from kdav_fast.data.sources.folder import open_folder
from kdav_fast.data.sources.tar_shards import open_shards
from tests.data.sources.small_shards import sample, write_shard


@pytest.fixture
def tree(tmp_path):
    """Two classes; 3 + 2 training images of 10 to 14 bytes, one evaluation image a class."""
    root = tmp_path / "tree"
    for split, counts in (("train", {"cat": 3, "dog": 2}), ("val", {"cat": 1, "dog": 1})):
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i}.jpg").write_bytes(bytes([i]) * (10 + i))
    return root


def of(root):
    return fingerprint(open_folder(root))


def test_it_is_of_the_images_not_of_their_place_or_time(tree, tmp_path):
    before = of(tree)
    assert json.loads(json.dumps(before)) == before
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(tree, moved)  # with times of its own
    os.utime(moved / "train/cat/0.jpg", (1, 1))
    assert of(moved) == before
    assert difference(before, of(moved)) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "train/cat/1.jpg").write_bytes(b"x" * 11), "train/cat/1.jpg has other content"),
        (lambda root: (root / "train/dog/0.jpg").write_bytes(b"x"), "train/dog/0.jpg has another size"),
        (lambda root: (root / "val/dog/0.jpg").write_bytes(b"y" * 10), "val/dog/0.jpg has other content"),
        (lambda root: (root / "train/cat/9.jpg").write_bytes(b"x"), "train has 5 images there and 6 here"),
        (lambda root: (root / "val/cat/7.jpg").write_bytes(b"x"), "val has 2 images there and 3 here"),
        (
            lambda root: (root / "train/dog/1.jpg").rename(root / "train/dog/2.jpg"),
            "train has train/dog/1.jpg there where it has train/dog/2.jpg here",
        ),
        (
            lambda root: (root / "val").rename(root / "test"),
            "the splits are train, val there and train, test here",
        ),
    ],
    ids=["content", "size", "evaluation", "more", "more evaluation", "name", "split"],
)
def test_what_changed_is_named(tree, change, said):
    before = of(tree)
    change(tree)
    assert difference(before, of(tree)) == said


def test_labels_and_class_names_count(tree):
    train, _ = open_folder(tree)
    other = replace(train, labels=np.array([0, 0, 1, 1, 1]))
    before = fingerprint([train])
    assert difference(before, fingerprint([other])) == "train/cat/2.jpg has another name or label"
    assert not same_names(before, fingerprint([other]), "train")
    renamed = replace(train, classes=("kitten", "dog"))
    assert difference(before, fingerprint([renamed])) == "the classes of train are named otherwise"
    assert same_names(before, fingerprint([renamed]), "train")


def test_of_many_files_a_part_is_read_and_all_sizes_count(tree, monkeypatch):
    monkeypatch.setattr(module, "_SECTIONS", 2)
    monkeypatch.setattr(module, "_SAMPLED_BYTES", 44)  # two of a mean size for each section of two or three
    train, _ = open_folder(tree)
    before = fingerprint([train])

    def said_with(name, content):
        kept = (tree / name).read_bytes()
        (tree / name).write_bytes(content)
        said = difference(before, fingerprint([replace(train)]))
        (tree / name).write_bytes(kept)
        return said

    seen = [said_with(name, b"x" * (tree / name).stat().st_size) for name in train.paths]
    one, other = "one of the 2 images from train/cat/0.jpg on", "one of the 3 images from train/cat/2.jpg on"
    content = "has other content"
    assert seen == [f"{one} {content}", f"{one} {content}", f"{other} {content}", None, f"{other} {content}"]
    assert said_with("train/dog/0.jpg", b"longer than it was") == f"{other} has another size"


def test_of_a_large_file_both_ends_are_read(tree):
    large = tree / "train/cat/0.jpg"
    large.write_bytes(bytes(2**21))
    before = of(tree)
    for place, shows in ((0, True), (2**20, False), (2**21 - 1, True)):
        with large.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        assert (difference(before, of(tree)) is not None) == shows
        with large.open("r+b") as file:
            file.seek(place)
            file.write(b"\0")


def test_a_file_that_is_gone_or_cannot_be_read(tree):
    train, _ = open_folder(tree)
    before = fingerprint([train])
    (tree / "train/cat/0.jpg").unlink()
    assert difference(before, fingerprint([replace(train)])) == "train/cat/0.jpg has another size"


def test_shards(tmp_path):
    def write(image):
        for split in ("train", "val"):
            write_shard(tmp_path / f"{split}-0.tar", sample("a", 0, image) + sample("b", 1, b"second"))
        return fingerprint(open_shards(tmp_path))

    before = write(b"12345")
    assert write(b"12345") == before
    assert difference(before, write(b"12346")) == "train-0.tar/a.jpg has other content"
    assert difference(before, write(b"123456")) == "train-0.tar/a.jpg has another size"


def test_of_decoded_images_every_pixel_counts(tmp_path):
    pixels = torch.zeros(1000, 2, 2, 3, dtype=torch.uint8)
    labels = np.zeros(1000, np.int64)
    make = lambda: PixelImages(tmp_path, "train", ("a", "b"), labels, pixels)  # noqa: E731
    before = fingerprint([make()])
    pixels[999, 1, 1, 2] = 1
    said = difference(before, fingerprint([make()]))
    assert said == "one of the 2 images from train image 998 on has other content"
