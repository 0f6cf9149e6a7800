"""What a reader finds at any moment of a write; tests/checkpoint/test_saving.py holds that it reaches the disk."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from kdav_fast.runtime.files import flush_folder, unfinished, write_cached, write_whole, write_whole_by_many

writers = pytest.mark.parametrize("write", [write_whole, write_cached, write_whole_by_many])


@writers
def test_content_and_folders(tmp_path, write):
    file = tmp_path / "a" / "b" / "file"
    write(file, b"one")
    write(file, b"\0\r\n")
    assert file.read_bytes() == b"\0\r\n"
    assert list(tmp_path.rglob("*.*")) == []


def test_text_is_utf8_and_keeps_its_line_ends(tmp_path):
    write_whole(tmp_path / "file", "Grün\r\n")
    assert (tmp_path / "file").read_bytes() == b"Gr\xc3\xbcn\r\n"


@writers
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file_alone(tmp_path, monkeypatch, write, error):
    file = tmp_path / "file"
    write(file, b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)):
        write(file, b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_what_a_crash_left_is_written_over(tmp_path):
    (tmp_path / "file.tmp").write_bytes(b"half of something long")
    write_whole(tmp_path / "file", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"new"}


@pytest.mark.parametrize("write", [write_cached, write_whole_by_many])
def test_any_number_may_write_at_once(tmp_path, write):
    contents = [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write(tmp_path / "file", content), contents * 10))
    assert (tmp_path / "file").read_bytes() in contents
    assert len(list(tmp_path.iterdir())) == 1


def test_what_killed_writers_left_is_found_and_nothing_else(tmp_path, monkeypatch):
    for name in (".hidden.file.tmp", "file.tmp", "file"):
        (tmp_path / name).touch()
    monkeypatch.setattr(os, "replace", lambda *_: None)
    write_whole_by_many(tmp_path / "file", b"new")  # as if it ended before the renaming
    left = unfinished(tmp_path)
    assert [path.read_bytes() for path in left] == [b"new"]
    assert left[0].name.startswith(".file.")


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_may_be_unable_to_flush_folders(tmp_path, monkeypatch, number, passes):
    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if passes:
        flush_folder(tmp_path)
    else:
        with pytest.raises(OSError, match="Input/output error"):
            flush_folder(tmp_path)
