"""A writer that is killed, has no room or is not alone: whole shards or none, and in the end the same bytes."""

import errno
import os
import resource
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from kdav_fast.errors import InputError
from kdav_fast.runtime import files
from kdav_fast.teachers.cache import AnswerCache, ShardDraft, prepare
from kdav_fast.teachers.cache.shard_file import cache_size, defects
from tests.teachers.cache.small_cache import KnownAnswers, contents, every_view, make, small_card

CARD = small_card()
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir"}
KILLED = 9


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What is in a cache that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    make(folder, CARD)
    return contents(folder)


def forked(work):
    """Call `work` in a child of this process; returns its number."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_before_change(folder, number):
    """Make a cache, but end without a further word before the change `number` of anything in its folder."""
    left = [number]

    def count():
        if left[0] == 0:
            os._exit(KILLED)
        left[0] -= 1

    def watch(event, arguments):
        if event in CHANGES and str(folder) in str(arguments):
            count()

    os.fsync = lambda _: count()
    sys.addaudithook(watch)
    make(folder, CARD)


def test_killed_before_any_change_and_continued(tmp_path, whole):
    """Each time the whole shards are as they were, no half of one is taken for one, and nothing is left beside them."""
    for number in range(200):
        folder = tmp_path / str(number)
        status = status_of(forked(partial(killed_before_change, folder, number)))
        if status == 0:
            break
        assert status == KILLED
        there = contents(folder) if folder.exists() else {}
        there = {name: content for name, content in there.items() if not name.endswith(".tmp")}
        assert there.items() <= whole.items()
        to_make = make(folder, CARD)
        assert len(to_make) == 3 - sum(name.startswith("shard-") for name in there)
        assert contents(folder) == whole
    assert number > 20
    assert contents(folder) == whole


def test_killed_in_the_middle_of_a_file(tmp_path, whole):
    def half(path, content):
        path.write_bytes(content[: len(content) // 2])
        os._exit(KILLED)

    make(tmp_path, CARD, shards=[0, 2])

    def work():
        files.write_flushed = half
        make(tmp_path, CARD)

    assert status_of(forked(work)) == KILLED
    assert len(contents(tmp_path)) == 4  # card, two shards and half of one
    assert list(make(tmp_path, CARD)) == [1]
    assert contents(tmp_path) == whole


def test_full_in_the_middle_of_a_file(tmp_path, whole):
    """A real limit, which stops a write half way."""
    make(tmp_path, CARD, shards=[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        with pytest.raises(
            InputError, match=r"shard 1 of the teacher's cache .* could not be written \(File too large"
        ):
            make(tmp_path, CARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path).keys() == {"cache.json", "shard-000000.safetensors"}
    assert list(make(tmp_path, CARD)) == [1, 2]
    assert contents(tmp_path) == whole


def test_a_full_disk_is_told_with_what_is_needed_and_free(tmp_path, monkeypatch):
    make(tmp_path, CARD, shards=[0])

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    draft, known = ShardDraft(tmp_path, CARD, 1), KnownAnswers(CARD.layout)
    known.put(draft, *every_view(draft.images, 2))
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**19))
    with pytest.raises(InputError) as said:
        draft.write()
    assert str(said.value) == (
        f"shard 1 of the teacher's cache {tmp_path} could not be written (No space left on device: 0.0 MiB are needed, "
        "0.5 MiB are free); those before it are whole: put that right, then the same command makes the others"
    )


def test_too_little_room_is_told_before_anything_is_made(tmp_path, monkeypatch):
    make(tmp_path, CARD, shards=[0])
    needed = cache_size(CARD) - (tmp_path / "shard-000000.safetensors").stat().st_size
    for free, refused in ((needed - 1, True), (needed, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if refused:
            with pytest.raises(
                InputError, match=r"needs 0.0 MiB for 2 more shards, but 0.0 MiB are free there"
            ):
                prepare(tmp_path, CARD)
        else:
            assert list(prepare(tmp_path, CARD)) == [1, 2]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/cache cannot be written: Not a directory"):
        prepare(tmp_path / "file" / "cache", CARD)


def test_two_processes_may_write_the_same_shard_at_once(tmp_path, whole):
    prepare(tmp_path, CARD)
    known = KnownAnswers(CARD.layout)

    def work(shards):
        for _ in range(8):
            for shard in shards:
                draft = ShardDraft(tmp_path, CARD, shard)
                known.put(draft, *every_view(draft.images, 2))
                draft.write()
                assert defects(tmp_path, CARD, sums=True, shards=[shard]) == {}

    child = forked(lambda: work([0, 2, 1]))
    work([0, 1])
    assert status_of(child) == 0
    assert contents(tmp_path) == whole
    AnswerCache(tmp_path).verify()
