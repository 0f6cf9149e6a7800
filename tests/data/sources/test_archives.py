import os
import pickle

import numpy as np
import pytest

from kdav_fast.data.sources.archives import open_archive, open_evaluation_archive
from kdav_fast.errors import InputError
from tests.data.sources.small_archives import COUNTS, FOLDERS, KINDS, check, files_of, write_folder, write_tar


@pytest.mark.parametrize("place", ["archive", "beside archive", "folder", "above folder"])
@pytest.mark.parametrize(("name", "archive"), KINDS)
def test_every_version_opens_wherever_the_root_points(tmp_path, name, archive, place):
    folder, files = FOLDERS[name][archive], files_of(name, archive)
    if "archive" in place:
        path = write_tar(tmp_path / archive, folder, files)
    else:
        path = write_folder(tmp_path / folder, files)
    root = path if place in ("archive", "folder") else tmp_path
    train, test = open_archive(name, root, download=False)
    check(name, train, "train", root)
    check(name, test, "test", root)
    check(name, open_evaluation_archive(name, root, download=False), "test", root)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_pickles_of_every_protocol_open(tmp_path, name, protocol):
    write_folder(tmp_path / "x", files_of(name, "python", protocol))
    for split, images in zip(COUNTS, open_archive(name, tmp_path / "x", download=False), strict=True):
        check(name, images, split, tmp_path / "x")


@pytest.mark.parametrize("mode", ["w", "w:bz2", "w:xz"])
def test_an_archive_may_be_packed_and_called_otherwise(tmp_path, mode):
    path = write_tar(tmp_path / "mine.tar", "renamed", files_of("cifar100", "python"), mode)
    check("cifar100", open_archive("cifar100", path, download=False)[0], "train", path)


def test_the_order_in_the_archive_does_not_matter(tmp_path):
    files = files_of("cifar10", "python")
    path = write_tar(tmp_path / "a.tar.gz", "x", dict(reversed(files.items())))
    check("cifar10", open_archive("cifar10", path, download=False)[0], "train", path)


def test_only_what_is_needed_is_read_from_an_archive(tmp_path):
    files = files_of("stl10", "binary")
    order = ("class_names.txt", "test_X.bin", "test_y.bin", "train_X.bin", "train_y.bin")
    path = write_tar(tmp_path / "a.tar", "x", {name: files[name] for name in order}, "w")
    path.write_bytes(path.read_bytes()[: 2 * 1024 + sum(len(files[name]) for name in order[:3]) + 4096])
    check("stl10", open_evaluation_archive("stl10", path, download=False), "test", path)
    with pytest.raises(InputError, match=r"a\.tar is not stl10 as published"):
        open_archive("stl10", path, download=False)


def test_a_folder_of_test_files_is_enough_to_evaluate(tmp_path):
    files = files_of("cifar100", "python")
    del files["train"]
    write_folder(tmp_path / "x", files)
    check("cifar100", open_evaluation_archive("cifar100", tmp_path / "x", False), "test", tmp_path / "x")
    with pytest.raises(InputError, match=r"it lacks train; expected"):
        open_archive("cifar100", tmp_path / "x", download=False)


@pytest.mark.parametrize(("name", "archive"), KINDS)
def test_where_nothing_is_the_message_tells_what_belongs_there(tmp_path, name, archive):
    for root in (tmp_path, tmp_path / "gone"):
        with pytest.raises(
            InputError, match=rf"holds no {name}: expected .*; put it there, or set data\.download="
        ):
            open_archive(name, root, download=False)
        with pytest.raises(InputError, match=rf"{archive} \(or {FOLDERS[name][archive]}/ from it\)"):
            open_evaluation_archive(name, root, download=False)


@pytest.mark.parametrize(("name", "archive"), KINDS)
def test_a_truncated_archive_is_refused(tmp_path, name, archive):
    path = write_tar(tmp_path / archive, FOLDERS[name][archive], files_of(name, archive))
    whole = path.read_bytes()
    for size in (0, 1, 20, len(whole) // 3, len(whole) // 2, len(whole) * 9 // 10):
        path.write_bytes(whole[:size])
        with pytest.raises(
            InputError, match=rf"{archive} is not {name} as published: it .*; expected"
        ) as error:
            open_archive(name, tmp_path, download=False)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "archive"), KINDS)
def test_something_else_is_refused(tmp_path, name, archive):
    path = tmp_path / archive
    for content in (b"", b"<html>Not found</html>" * 100, os.urandom(5000), b"\x1f\x8b\x08" + b"\0" * 500):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{archive} (is not {name} as published|cannot be read)"):
            open_archive(name, path, download=False)
    other = "cifar10" if name != "cifar10" else "stl10"
    write_tar(path, "x", files_of(other, "binary"))
    with pytest.raises(InputError, match=r"it lacks .*; expected"):
        open_archive(name, path, download=False)


def _labels_of(change):
    """Writes other labels into CIFAR-10's first pickle."""

    def damage(files):
        batch = pickle.loads(files["data_batch_1"], encoding="latin1")
        files["data_batch_1"] = pickle.dumps(batch | change(batch))

    return damage


def _set(name, content):
    return lambda files: files.__setitem__(name, content(files[name]) if callable(content) else content)


@pytest.mark.parametrize(
    ("name", "archive", "damage", "message"),
    [
        ("cifar10", "python", lambda files: files.pop("data_batch_3"), r"it lacks data_batch_3"),
        ("cifar10", "python", _set("data_batch_2", b"junk"), r"data_batch_2 is no pickle of plain values"),
        ("cifar10", "python", _set("data_batch_2", lambda old: old[:-9]), r"data_batch_2 is no pickle"),
        ("cifar10", "python", _set("data_batch_2", pickle.dumps([1])), r"data_batch_2 holds no dictionary"),
        (
            "cifar10",
            "python",
            _set("batches.meta", pickle.dumps({})),
            r"class names holds no list 'label_names'",
        ),
        (
            "cifar10",
            "python",
            _set("batches.meta", pickle.dumps({"label_names": []})),
            r"names no class, or one",
        ),
        (
            "cifar10",
            "python",
            _set("batches.meta", pickle.dumps({"label_names": [1]})),
            r"'label_names' of texts",
        ),
        (
            "cifar10",
            "python",
            _set("batches.meta", pickle.dumps({b"label_names": [b"a", b"b", "a"]})),
            r"names no class, or one twice",
        ),
        (
            "cifar10",
            "python",
            _labels_of(lambda b: {"labels": [0]}),
            r"data_batch_1 holds no list 'labels' of 2",
        ),
        ("cifar10", "python", _labels_of(lambda b: {"labels": [0, 1.5]}), r"holds no list 'labels'"),
        ("cifar10", "python", _labels_of(lambda b: {"labels": [0, 10**30]}), r"holds no list 'labels'"),
        ("cifar10", "python", _labels_of(lambda b: {"labels": [[0], [1, 2]]}), r"holds no list 'labels'"),
        ("cifar10", "python", _labels_of(lambda b: {"labels": None}), r"holds no list 'labels'"),
        (
            "cifar10",
            "python",
            _labels_of(lambda b: {"labels": [0, 3]}),
            r"label of train is 3, but there are 3",
        ),
        ("cifar10", "python", _labels_of(lambda b: {"labels": [0, -1]}), r"label of train is -1"),
        ("cifar10", "python", _labels_of(lambda b: {"data": b["data"][:, 1:]}), r"'data' of N x 3072 bytes"),
        ("cifar10", "python", _labels_of(lambda b: {"data": b["data"].astype(float)}), r"'data' of N x 3072"),
        ("cifar10", "python", _labels_of(lambda b: {"data": b["data"].tolist()}), r"'data' of N x 3072"),
        ("cifar100", "python", _set("test", pickle.dumps({"labels": []})), r"test holds no array 'data'"),
        (
            "cifar100",
            "python",
            _set("test", pickle.dumps({"fine_labels": [], "data": np.zeros((0, 3072), np.uint8)})),
            r"its test files hold no image",
        ),
        ("cifar10", "binary", _set("data_batch_4.bin", b"123"), r"data_batch_4\.bin has 3 bytes.*of 3,073"),
        (
            "cifar10",
            "binary",
            _set("test_batch.bin", b"\x03" * 3073),
            r"a label of test is 3, but there are 3",
        ),
        ("cifar10", "binary", _set("batches.meta.txt", b"\n \n"), r"batches\.meta\.txt names no class"),
        ("cifar100", "binary", _set("test.bin", b"\0" * 3073), r"test\.bin has 3,073 bytes.*of 3,074"),
        ("cifar100", "binary", _set("fine_label_names.txt", b"\xff\xfe"), r"its class names are no text"),
        (
            "stl10",
            "binary",
            _set("train_X.bin", lambda old: old[:-1]),
            r"train_X\.bin has .* bytes.*of 27,648",
        ),
        (
            "stl10",
            "binary",
            _set("test_y.bin", b"\1"),
            r"test_y\.bin has 1 labels for the 4 images of test_X",
        ),
        ("stl10", "binary", _set("test_y.bin", b"\1\2\0\1"), r"a label of test is -1"),
        (
            "stl10",
            "binary",
            _set("test_y.bin", b"\1\2\4\1"),
            r"a label of test is 3, but there are 3 classes",
        ),
        (
            "stl10",
            "binary",
            lambda files: files.update({"test_X.bin": b"", "test_y.bin": b""}),
            r"hold no image",
        ),
    ],
)
def test_damaged_content_is_refused_in_one_line(tmp_path, name, archive, damage, message):
    files = files_of(name, archive)
    damage(files)
    folder = write_folder(tmp_path / "x", files)
    path = write_tar(tmp_path / "x.tar.gz", "x", files)
    for root in (folder, path):
        with pytest.raises(
            InputError, match=rf"is not {name} as published: .*{message}.*; expected"
        ) as error:
            open_archive(name, root, download=False)
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(str(root))


class _Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_wants_to_run_something_does_not(tmp_path, protocol):
    trace = tmp_path / "it ran"
    for function, argument in (
        (os.system, f"touch '{trace}'"),
        (os.mkdir, str(trace)),
        (exec, "raise SystemExit"),
    ):
        files = files_of("cifar100", "python")
        files["train"] = pickle.dumps({"data": _Runs(function, argument)}, protocol)
        folder = write_folder(tmp_path / f"{function.__name__}", files)
        with pytest.raises(InputError, match=r"train is no pickle of plain values \(.*it asks for .*\.\w+\)"):
            open_archive("cifar100", folder, download=False)
    assert not trace.exists()
