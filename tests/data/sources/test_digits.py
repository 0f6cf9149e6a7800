from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from kdav_fast.data.sources.digits import prepare_digits
from kdav_fast.data.sources.folder import open_folder
from kdav_fast.errors import InputError


def test_digits_are_complete_balanced_and_scaled(cache):
    root = prepare_digits()
    assert root == cache / "digits"
    train, evaluation = open_folder(root)
    assert (len(train), len(evaluation)) == (897, 900)
    assert train.classes == tuple("0123456789")
    assert np.abs(np.bincount(train.labels) - np.bincount(evaluation.labels)).max() <= 2
    with Image.open(root / train.paths[0]) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (8, 8)
    assert pixels.dtype == np.uint8
    assert pixels.max() == 255


def test_a_damaged_cache_is_repaired_and_a_whole_one_left_alone(tmp_path):
    root = prepare_digits(tmp_path / "digits")
    paths = [root / path for folder in open_folder(root) for path in folder.paths]
    before = {path: path.read_bytes() for path in paths}
    paths[0].unlink()
    paths[1].write_bytes(b"")
    prepare_digits(root)
    assert {path: path.read_bytes() for path in paths} == before
    times = [path.stat().st_mtime_ns for path in paths]
    prepare_digits(root)
    assert [path.stat().st_mtime_ns for path in paths] == times


def test_several_may_prepare_at_once(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        for root in pool.map(prepare_digits, [tmp_path / "digits"] * 3):
            assert root == tmp_path / "digits"
    train, evaluation = open_folder(tmp_path / "digits")
    assert (len(train), len(evaluation)) == (897, 900)
    assert not list((tmp_path / "digits").rglob("*.tmp"))


@pytest.mark.parametrize("path", ["notes.txt", "train/cat/1.png"])
def test_a_folder_with_other_data_is_refused(tmp_path, path):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).touch()
    with pytest.raises(InputError, match=r"for the digits holds other files"):
        prepare_digits(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"the digits cannot be kept in .*; set data\.root"):
        prepare_digits(tmp_path / "file" / "digits")
