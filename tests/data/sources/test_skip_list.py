import os

import pytest

from kdav_fast.data.sources.skip_list import leave_out, write_skip_list
from kdav_fast.errors import InputError


@pytest.fixture
def splits(numbered_split):
    return numbered_split(5), numbered_split(4, "val")


def test_the_named_images_are_left_out_of_either_split(splits, tmp_path):
    path = tmp_path / "lists" / "skip.txt"
    write_skip_list(
        path, [("train/0001.png", "truncated"), ("val/0003.png", "empty"), ("train/0004.png", "x")]
    )
    train, evaluation = leave_out(path, *splits)
    assert train.paths == ("train/0000.png", "train/0002.png", "train/0003.png")
    assert train.labels.tolist() == [0, 2, 0]
    assert train.classes == splits[0].classes
    assert evaluation.paths == ("val/0000.png", "val/0001.png", "val/0002.png")


def test_a_list_written_by_hand_needs_no_reasons(splits, tmp_path):
    (tmp_path / "skip.txt").write_text("train/0000.png\n\ntrain/0002.png")
    train, evaluation = leave_out(tmp_path / "skip.txt", *splits)
    assert len(train) == 3
    assert evaluation is splits[1]


def test_a_list_saved_by_an_editor_of_windows(splits, tmp_path):
    (tmp_path / "skip.txt").write_bytes(b"\xef\xbb\xbftrain/0000.png\r\ntrain/0002.png\ttruncated\r\n")
    train, _ = leave_out(tmp_path / "skip.txt", *splits)
    assert train.paths == ("train/0001.png", "train/0003.png", "train/0004.png")


def test_a_pipe_is_not_waited_for(splits, tmp_path):
    os.mkfifo(tmp_path / "skip.txt")
    with pytest.raises(InputError, match=r"skip\.txt is a pipe or a device; give a file"):
        leave_out(tmp_path / "skip.txt", *splits)


def test_names_that_are_not_utf8_survive(numbered_split, tmp_path):
    split = numbered_split(2)
    odd = "train/caf\udce9.png"
    (split.root / split.paths[1]).rename(split.root / odd)
    renamed = type(split)(split.root, split.split, split.classes, split.labels, (split.paths[0], odd))
    write_skip_list(tmp_path / "skip.txt", [(odd, "truncated")])
    assert b"train/caf\xe9.png\t" in (tmp_path / "skip.txt").read_bytes()
    assert leave_out(tmp_path / "skip.txt", renamed)[0].paths == (split.paths[0],)


def test_no_list_changes_nothing(splits):
    assert leave_out(None, *splits) == splits


def test_an_empty_list_changes_nothing(splits, tmp_path):
    write_skip_list(tmp_path / "skip.txt", [])
    assert leave_out(tmp_path / "skip.txt", *splits) == splits


def test_an_evaluation_split_alone_may_not_be_in_the_list(splits, tmp_path):
    write_skip_list(tmp_path / "skip.txt", [("train/0000.png", "empty")])
    assert leave_out(tmp_path / "skip.txt", splits[1]) == splits[1:]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["0001.png"],
            r"no line of data\.skip_list .* names an image of this data set, such as 'train/0000\.png'",
        ),
        ([f"val/{i:04d}.png" for i in range(4)], r"data\.skip_list .* leaves no image of val; shorten it"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(splits, tmp_path, names, message):
    write_skip_list(tmp_path / "skip.txt", [(name, "truncated") for name in names])
    with pytest.raises(InputError, match=message) as error:
        leave_out(tmp_path / "skip.txt", *splits)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_or_written_are_named(splits, tmp_path):
    with pytest.raises(InputError, match=r"data\.skip_list .*none\.txt: No such file.*--quarantine"):
        leave_out(tmp_path / "none.txt", *splits)
    with pytest.raises(InputError, match=r"cannot write .*; give a file that can be written"):
        write_skip_list(tmp_path / "train" / "0000.png" / "skip.txt", [])
