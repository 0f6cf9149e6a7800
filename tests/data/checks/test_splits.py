"""What is said of two splits taken together: classes, sizes, images that are in both."""

import os
import shutil

import numpy as np
import pytest
import torch

from kdav_fast.data.checks import splits as module
from kdav_fast.data.checks.splits import check_splits, shared_images
from kdav_fast.data.image_set import PixelImages
from kdav_fast.data.sources import Splits
from kdav_fast.data.sources.folder import open_folder
from kdav_fast.data.sources.tar_shards import open_shards
from kdav_fast.errors import InputError
from tests.data.sources.small_shards import sample, write_shard


@pytest.fixture
def tree(tmp_path):
    """Two classes; four training and three evaluation images each, all of 8 random bytes."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{split}{i}.jpg").write_bytes(draw.bytes(8))
    return tmp_path / "tree"


def check(root, batch_size=4):
    return check_splits(Splits(*open_folder(root)), batch_size)


def test_of_sound_splits_there_is_nothing_to_say(tree):
    assert check(tree) == []
    assert check(tree, batch_size=8) == []


def test_one_class_is_nothing_to_learn(tree):
    for split in ("train", "val"):
        shutil.rmtree(tree / split / "dog")
    with pytest.raises(
        InputError, match=r"all 4 training images in .*tree are of one class, 'cat', so that there is"
    ):
        check(tree)


def test_one_class_after_a_subset(tree):
    train, evaluation = open_folder(tree)
    with pytest.raises(InputError, match="all 3 training images .* of one class, 'dog'"):
        check_splits(Splits(train.select(np.array([5, 6, 7])), evaluation), 1)


def test_a_batch_larger_than_the_data(tree):
    [said] = check(tree, batch_size=9)
    assert said.startswith(
        f"warning: train.batch_size is 9 but {tree} has 8 training images: every step takes all"
    )


def test_classes_without_training_images(tmp_path):
    labels = np.array([0, 2, 0, 2])
    classes = tuple("abcdefghij")
    pixels = torch.arange(8 * 12).view(8, 2, 2, 3).to(torch.uint8)
    train = PixelImages(tmp_path, "train", classes, labels, pixels[:4])
    evaluation = PixelImages(tmp_path, "test", classes, np.array([0, 1, 9, 2]), pixels[4:])
    expected = "warning: 8 of 10 classes have no training image: 'b', 'd', 'e', 'f', 'g' and 3 more"
    assert check_splits(Splits(train, evaluation), 4) == [f"{expected}; 2 evaluation images are of these"]
    assert check_splits(Splits(train, evaluation.select(np.array([0, 3]))), 4) == [expected]


@pytest.mark.parametrize("copy", [os.symlink, os.link, shutil.copy])
def test_some_images_in_both(tree, copy):
    (tree / "val/dog/val1.jpg").unlink()
    copy(tree / "train/cat/train2.jpg", tree / "val/dog/val1.jpg")
    said = "warning: 1 of 6 val images examined are training images as well (val/dog/val1.jpg is train/cat/train2.jpg)"
    assert check(tree) == [f"{said}, so that the accuracy is not of unseen images"]


@pytest.mark.parametrize("copy", [os.symlink, shutil.copytree])
def test_val_that_is_train(tree, copy):
    shutil.rmtree(tree / "val")
    copy(tree / "train", tree / "val")
    [said] = check(tree)
    assert (
        "warning: all 8 val images examined are training images (val/cat/train0.jpg is train/cat/train0"
        in said
    )


def test_an_end_in_common_is_not_enough(tree):
    tail = bytes(5000)
    (tree / "train/cat/train0.jpg").write_bytes(b"one" + tail)
    (tree / "val/cat/val0.jpg").write_bytes(b"two" + tail)
    assert check(tree) == []
    (tree / "val/cat/val0.jpg").write_bytes(b"one" + tail)
    assert len(check(tree)) == 1


def test_of_many_images_those_of_the_same_name_come_first(tree, monkeypatch):
    monkeypatch.setattr(module, "_COMPARED", 6)
    monkeypatch.setattr(module, "_EXAMINED", 6)  # hence one training image for each
    original = (tree / "train/dog/train3.jpg").rename(tree / "train/dog/one.jpg")
    shutil.copy(original, tree / "val/cat/one.jpg")
    assert len(check(tree)) == 1
    read = []
    monkeypatch.setattr(module, "_tail", lambda images, position: read.append(position))
    check(tree)
    assert len(read) <= 12


def test_shards_and_decoded_images(tmp_path):
    write_shard(tmp_path / "train-0.tar", sample("a", 0, b"1") + sample("b", 1, b"2"))
    write_shard(tmp_path / "val-0.tar", sample("c", 0, b"3") + sample("d", 1, b"2"))
    assert shared_images(*open_shards(tmp_path)) == (2, [(1, 1)])
    pixels = torch.arange(5 * 12).view(5, 2, 2, 3).to(torch.uint8)
    pixels[4] = pixels[1]
    labels = np.array([0, 1, 0, 1, 0])
    train = PixelImages(tmp_path, "train", ("a", "b"), labels[:3], pixels[:3])
    evaluation = PixelImages(tmp_path, "test", ("a", "b"), labels[3:], pixels[3:])
    assert shared_images(train, evaluation) == (2, [(1, 1)])
