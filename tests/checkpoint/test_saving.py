"""What is on the disk at every moment of a save, and what is kept."""

import errno
import hashlib
import itertools
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest

from kdav_fast.errors import InputError
from tests.checkpoint.small_folders import (
    PIECES,
    STATE,
    contents,
    flip_bit,
    folders_in,
    save,
    snapshot,
    steps_in,
)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoints"


def test_all_is_flushed_before_it_gets_its_name_and_then_the_pointer_follows(root, monkeypatch):
    save(folders_in(root), 2)
    done = []

    def watch(name):
        call = getattr(os, name)

        def watched(*arguments):
            if name == "fsync":
                path = Path(f"/proc/self/fd/{arguments[0]}").readlink()
                size = path.stat().st_size if path.is_file() else None
                done.append((name, str(path.relative_to(root)), size))
            else:
                done.append((name, *[Path(path).name for path in arguments]))
            return call(*arguments)

        monkeypatch.setattr(os, name, watched)

    for name in ("fsync", "rename", "replace"):
        watch(name)
    save(folders_in(root), 3)
    temporary, final = "step-00000003.tmp", "step-00000003"
    assert done == [
        ("fsync", f"{temporary}/{PIECES}", 10_000),
        ("fsync", f"{temporary}/{STATE}", 11),
        ("fsync", f"{temporary}/manifest.json", (root / final / "manifest.json").stat().st_size),
        ("fsync", temporary, None),
        ("rename", temporary, final),
        ("fsync", "latest.tmp", len(f"{final}\n")),
        ("replace", "latest.tmp", "latest"),
        ("fsync", ".", None),
    ]
    assert (root / "latest").read_text() == f"{final}\n"


class Crash(BaseException):
    """The machine has stopped."""


class Machine:
    """Stops after any of the calls that change or flush the disk; what was not flushed is then lost."""

    def __init__(self, monkeypatch):
        self._calls, self._last = 0, sys.maxsize
        for name in ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name, call):
        def watched(*arguments, **options):
            if self._calls < self._last:
                self._calls += 1
                call(*arguments, **options)
                if name == "fsync":
                    os.utime(arguments[0], (0, 0))  # a mark that the next change of the file takes away
            if self._calls == self._last:
                raise Crash

        return watched

    def stop_after(self, calls):
        self._calls, self._last = 0, calls

    def restart(self, root):
        self._last = sys.maxsize
        for file in root.rglob("*"):
            if file.is_file() and file.stat().st_mtime != 0:
                file.write_bytes(b"")


@pytest.mark.parametrize(
    ("earlier", "damaged"),
    [(0, False), (2, False), (3, True)],
    ids=["the first", "one of several", "after a damaged one"],
)
def test_a_crash_at_any_moment_leaves_a_whole_newest_checkpoint(root, monkeypatch, capsys, earlier, damaged):
    machine, found_steps = Machine(monkeypatch), []
    for calls in itertools.count(1):
        shutil.rmtree(root, ignore_errors=True)
        for step in range(1, earlier + 1):
            save(folders_in(root), step)
        if damaged:  # the run goes back before it, and saves that step again
            flip_bit(root / "step-00000003" / PIECES, 5)
            os.utime(root / "step-00000003" / PIECES, (0, 0))
        folders = folders_in(root, keep=1)
        folders.newest_intact()
        capsys.readouterr()
        machine.stop_after(calls)
        try:
            save(folders, 3)
            break
        except Crash:
            machine.restart(root)

        folder, manifest = folders_in(root).newest_intact() or (None, {"step": 0, "files": {}})
        found_steps.append(manifest["step"])
        if folder:
            written = contents(manifest["step"])
            assert {name: (folder / name).read_bytes() for name in manifest["files"]} == written
        if not damaged:
            printed = capsys.readouterr().out
            assert "is damaged" not in printed
            assert "which is not there" not in printed
            for path in root.glob("step-*[0-9]"):  # the older ones as well
                assert {file.name for file in path.iterdir()} == {PIECES, STATE, "manifest.json"}
        save(folders_in(root, keep=1), 4)
        assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000004"]
    assert set(found_steps) == {min(earlier, 2), 3}
    assert found_steps == sorted(found_steps)
    assert steps_in(root) == [3]


def test_a_crash_while_a_step_is_saved_again_leaves_the_former_or_the_new(root, monkeypatch):
    """But for one moment, between the renames."""
    machine, found = Machine(monkeypatch), []
    for calls in itertools.count(1):
        shutil.rmtree(root, ignore_errors=True)
        folders = folders_in(root)
        save(folders, 0, score=1.0)
        machine.stop_after(calls)
        try:
            save(folders, 0, score=2.0)
            break
        except Crash:
            machine.restart(root)
        _, manifest = folders_in(root).newest_intact() or (None, {"score": None})
        found.append(manifest["score"])
    assert [score for score, _ in itertools.groupby(found)] == [1.0, None, 2.0]
    assert found.count(None) == 1
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000000"]


def test_what_an_interrupted_save_left_is_removed_by_the_next(root):
    (root / "step-00000001.tmp").mkdir(parents=True)
    (root / "step-00000001.tmp" / PIECES).write_bytes(b"half")
    (root / "step-00000002.tmp").mkdir()
    (root / "step-00000002.tmp" / "rank-00001.json").write_bytes(b"of a run with more processes")
    save(folders_in(root), 2)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000002"]
    assert sorted(path.name for path in (root / "step-00000002").iterdir()) == [
        "manifest.json",
        PIECES,
        STATE,
    ]


def test_the_manifest_names_every_file_with_its_size_and_checksum(root):
    folders = folders_in(root)
    folders.begin(7, contents(7), {"world": 1, "score": 12.5, "loss_scale": {"value": 2.0}})
    folders.finish()
    manifest = json.loads((root / "step-00000007" / "manifest.json").read_text())
    assert folders.newest_intact() == (
        root / "step-00000007",
        {
            "step": 7,
            "world": 1,
            "score": 12.5,
            "loss_scale": {"value": 2.0},
            "files": {
                name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                for name, content in contents(7).items()
            },
        },
    )
    own = manifest.pop("sha256")
    assert own == hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def test_writing_goes_on_in_the_background_and_a_save_finishes_the_one_before(root, monkeypatch):
    may_go_on, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: may_go_on.wait(60) and fsync(handle))
    folders = folders_in(root)
    folders.finish()  # of nothing
    assert (folders.pending, folders.writing) == (None, False)
    folders.begin(1, contents(1), {})
    assert (folders.pending, folders.writing) == (1, True)
    assert folders_in(root).newest_intact() is None
    may_go_on.set()
    folders.begin(2, contents(2), {})
    assert folders.pending == 2
    assert folders_in(root).newest_intact()[1]["step"] == 1
    folders.finish()
    assert (folders.pending, folders.writing) == (None, False)
    assert folders_in(root).newest_intact()[1]["step"] == 2


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (PIECES, "rank 0: No space left on device"),
        (STATE, "rank 0: No space left on device"),
        ("manifest.json", "No space left on device"),
        ("step-00000002.tmp", "No space left on device"),
    ],
)
def test_a_failure_to_write_is_told_at_the_end_and_leaves_nothing(root, monkeypatch, where, reason):
    folders = folders_in(root, keep=1)
    save(folders, 1)
    before, fsync = snapshot(root), os.fsync

    def full(handle):
        if Path(f"/proc/self/fd/{handle}").readlink().name == where:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        folders.begin(2, contents(2), {})
        with pytest.raises(InputError) as caught:
            folders.finish()
    assert str(caught.value) == (
        f"the checkpoint of step 2 could not be written ({reason}); earlier ones are as they were: put that right, "
        "then the same command continues from the last of them"
    )
    assert folders.pending is None
    assert snapshot(root) == before
    save(folders, 2)
    assert steps_in(root) == [2]


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"^the checkpoint of step 1 could not be written \(Not a directory\)"
    ):
        folders_in(tmp_path / "file" / "checkpoints").begin(1, contents(1), {})


@pytest.mark.parametrize(
    ("keep", "keep_best", "scores", "kept"),
    [
        (2, True, [None, None, None, None], [3, 4]),
        (2, True, [9.0, 1.0, 2.0, 3.0], [1, 3, 4]),
        (2, False, [9.0, 1.0, 2.0, 3.0], [3, 4]),
        (1, True, [1.0, 2.0, 3.0], [3]),
        (1, True, [5.0, 5.0, 1.0], [2, 3]),
        (1, True, [9.0, 1.0, 10.0, 1.0, 1.0], [3, 5]),
        (1, True, [1.0, 9.0, None, None], [2, 4]),
        (1, True, [0.0, None, None], [1, 3]),
        (5, True, [1.0, 2.0], [1, 2]),
    ],
    ids=[
        "without scores",
        "the best is old",
        "the best does not count",
        "the best is the newest",
        "the newer of equals",
        "a new best takes the place of the old",
        "some without scores",
        "zero is a score",
        "fewer than may be kept",
    ],
)
@pytest.mark.parametrize("restarted", [False, True], ids=["in one go", "restarted each time"])
def test_the_newest_and_the_best_are_kept(root, keep, keep_best, scores, kept, restarted):
    folders = folders_in(root, keep, keep_best)
    for step, score in enumerate(scores, start=1):
        if restarted:
            folders = folders_in(root, keep, keep_best)
            folders.newest_intact()
        save(folders, step, score)
    assert steps_in(root) == kept
