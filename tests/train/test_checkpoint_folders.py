"""Checkpoint folders without training: what is on the disk at every moment, and what is made of damage.

Run as a script, this file is one of two processes that save and load together.
"""

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
import torch

from kdav_fast.errors import InputError
from kdav_fast.train.checkpoint_folders import CheckpointFolders
from kdav_fast.train.distributed import Cluster, start_cluster
from tests.train import processes

ALONE = Cluster(0, 1, 0, 1, torch.device("cpu"))
PIECES, STATE = "pieces-00000.safetensors", "rank-00000.json"


def folders_in(root, keep=9, keep_best=True):
    return CheckpointFolders(root, ALONE, keep, keep_best)


def contents(step):
    return {PIECES: bytes([step]) * 10_000, STATE: b'{"step": %d}' % step}


def save(folders, step, score=None):
    folders.begin(step, contents(step), {"score": score})
    folders.finish()


def steps_in(root):
    return [int(path.name.removeprefix("step-")) for path in sorted(root.glob("step-*[0-9]"))]


def flip_bit(file, position, bit=0):
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoints"


# What a save does, in which order.


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


def snapshot(root):
    return {path.relative_to(root): path.is_file() and path.read_bytes() for path in root.rglob("*")}


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


# What is made of damage.


def rewrite_manifest(folder, change):
    """Change a manifest as somebody would who knows how it is sealed."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    file.write_text(json.dumps(manifest))


def rename_record(manifest, name):
    manifest["files"][name] = manifest["files"].pop(STATE)


def to_folder(file):
    file.unlink()
    file.mkdir()


DAMAGE = {
    "truncated": (lambda f: os.truncate(f / PIECES, 9_999), f"{PIECES} has 9999 bytes instead of 10000"),
    "longer": (lambda f: os.truncate(f / PIECES, 10_001), f"{PIECES} has 10001 bytes instead of 10000"),
    "first bit flipped": (lambda f: flip_bit(f / PIECES, 0), f"{PIECES} has other content than was written"),
    "last bit flipped": (
        lambda f: flip_bit(f / STATE, -1, bit=7),
        f"{STATE} has other content than was written",
    ),
    "missing file": (lambda f: (f / STATE).unlink(), f"{STATE}: No such file or directory"),
    "empty file": (lambda f: os.truncate(f / PIECES, 0), f"{PIECES} has 0 bytes instead of 10000"),
    "folder for a file": (lambda f: to_folder(f / STATE), f"{STATE} has "),
    "several": (
        lambda f: [path.unlink() for path in (f / STATE, f / PIECES)],
        f"{PIECES}: No such file or directory; {STATE}: No such file or directory",
    ),
    "no files": (
        lambda f: [path.unlink() for path in f.iterdir()],
        "manifest.json: No such file or directory",
    ),
    "manifest missing": (
        lambda f: (f / "manifest.json").unlink(),
        "manifest.json: No such file or directory",
    ),
    "manifest a folder": (lambda f: to_folder(f / "manifest.json"), "manifest.json: Is a directory"),
    "manifest of an earlier step": (
        lambda f: shutil.copy(f.with_name("step-00000001") / "manifest.json", f),
        "manifest.json has other content than was written",
    ),
    "sealed, but a path": (
        lambda f: rewrite_manifest(f, lambda m: rename_record(m, f"../step-00000001/{STATE}")),
        "manifest.json is not a manifest",
    ),
    "sealed, but dots": (
        lambda f: rewrite_manifest(f, lambda m: rename_record(m, "..")),
        "manifest.json is not a manifest",
    ),
    "sealed, but a name that no file can have": (
        lambda f: rewrite_manifest(f, lambda m: rename_record(m, "a\0b")),
        "manifest.json is not a manifest",
    ),
    "sealed, but without checksum": (
        lambda f: rewrite_manifest(f, lambda m: m["files"][STATE].pop("sha256")),
        "manifest.json is not a manifest",
    ),
    "sealed, but without size": (
        lambda f: rewrite_manifest(f, lambda m: m["files"][STATE].pop("bytes")),
        "manifest.json is not a manifest",
    ),
    "sealed, but a list of files": (
        lambda f: rewrite_manifest(f, lambda m: m.update(files=[STATE])),
        "manifest.json is not a manifest",
    ),
    **{
        f"manifest is {name}": (
            lambda f, content=content: (f / "manifest.json").write_bytes(content),
            "manifest.json is not a manifest",
        )
        for name, content in {
            "empty": b"",
            "torn": b'{"step": 2, "fi',
            "text": b"hello\n",
            "bytes": b"\xff\xfe\0",
            "a list": b"[]",
            "null": b"null",
            "an empty object": b"{}",
            "without end": b"[" * 100_000,
        }.items()
    },
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_the_newest_is_told_in_one_line_and_the_one_before_is_used(root, capsys, damage):
    for step in (1, 2):
        save(folders_in(root), step)
    act, told = DAMAGE[damage]
    act(root / "step-00000002")
    folders = folders_in(root)
    folder, manifest = folders.newest_intact()
    assert (folder, manifest["step"]) == (root / "step-00000001", 1)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"checkpoint {root / 'step-00000002'} is damaged: {told}")
    assert second == f"using {folder} instead"
    save(folders, 2)  # the run comes to that step again
    assert folders_in(root).newest_intact()[1]["step"] == 2
    assert capsys.readouterr().out == ""


def test_no_bit_of_a_manifest_can_flip_unnoticed(root):
    for step in (1, 2):
        save(folders_in(root), step, score=12.5)
    file = root / "step-00000002" / "manifest.json"
    content = file.read_bytes()
    for position in range(len(content)):
        flip_bit(file, position, bit=position % 8)
        assert folders_in(root).newest_intact()[1]["step"] == 1, position
        file.write_bytes(content)
    assert folders_in(root).newest_intact()[1]["step"] == 2


def test_a_copy_under_another_step_is_no_checkpoint_of_that_step(root, capsys):
    save(folders_in(root), 1)
    shutil.copytree(root / "step-00000001", root / "step-00000005")
    assert folders_in(root).newest_intact()[1]["step"] == 1
    assert "step-00000005 is damaged: manifest.json has other content" in capsys.readouterr().out


def test_damaged_ones_of_later_steps_do_not_push_out_intact_ones(root):
    for step in (1, 2, 3, 4, 5):
        save(folders_in(root), step, score=float(step))
    for step in (3, 4, 5):
        flip_bit(root / f"step-{step:08d}" / PIECES, 3)
    folders = folders_in(root, keep=2)
    assert folders.newest_intact()[1]["step"] == 2
    save(folders, 3, score=0.0)
    assert steps_in(root) == [2, 3]
    assert folders_in(root).newest_intact()[1]["step"] == 3


def test_when_all_are_damaged_nothing_is_used_and_nothing_removed(root, capsys):
    for step in (1, 2):
        save(folders_in(root), step)
        flip_bit(root / f"step-{step:08d}" / PIECES, 3)
    before = snapshot(root)
    with pytest.raises(InputError) as caught:
        folders_in(root).newest_intact()
    assert str(caught.value) == (
        f"every checkpoint in {root} is damaged; restore one from a copy, or remove that folder to begin the run anew"
    )
    assert [line.split(" is ")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"checkpoint {root / 'step-00000002'}",
        f"checkpoint {root / 'step-00000001'}",
    ]
    assert snapshot(root) == before


def test_without_checkpoints_there_is_none(root, capsys):
    assert folders_in(root).newest_intact() is None
    root.mkdir()
    assert folders_in(root).newest_intact() is None
    (root / "step-00000009").write_text("a file")
    for name in ("step-abc", "step-9", "step-00000009x", "step-00000008.tmp", "other"):
        (root / name).mkdir()
    assert folders_in(root).newest_intact() is None
    assert capsys.readouterr().out == ""


def test_what_does_not_belong_there_is_ignored_and_stays(root, capsys):
    save(folders_in(root), 1)
    (root / "notes.txt").write_text("mine")
    (root / "step-00000009").write_text("a file")
    (root / "step-abc").mkdir()
    (root / "step-00000001" / "notes.txt").write_text("mine")
    assert folders_in(root).newest_intact()[0] == root / "step-00000001"
    assert capsys.readouterr().out == ""
    save(folders_in(root, keep=1), 2)
    assert {path.name for path in root.iterdir()} == {
        "latest",
        "notes.txt",
        "step-00000002",
        "step-00000009",
        "step-abc",
    }


@pytest.mark.parametrize(
    ("pointer", "told"),
    [
        (b"step-00000007\n", "'step-00000007', which is not there; looking for other checkpoints"),
        (b"", "'', which is not there"),
        (b"\xff\n", "which is not there"),
        (b"../../elsewhere\n", "'../../elsewhere', which is not there"),
        (b"step-00000001\n", None),  # a crash came between the newest one's name and its pointer
        (None, None),
    ],
)
def test_the_newest_is_found_whatever_the_pointer_names(root, capsys, pointer, told):
    for step in (1, 2):
        save(folders_in(root), step)
    (root / "latest").unlink()
    if pointer is not None:
        (root / "latest").write_bytes(pointer)
    assert folders_in(root).newest_intact()[1]["step"] == 2
    printed = capsys.readouterr().out.splitlines()
    if told is None:
        assert printed == []
    else:
        [line] = printed
        assert line.startswith(f"{root / 'latest'} names ")
        assert told in line


# Two processes.


def main(root: Path) -> None:
    """Save, fail to save and load on two ranks; prints what this one saw."""
    cluster = start_cluster("cpu")
    folders = CheckpointFolders(root, cluster, 2, True)
    own = f"rank-{cluster.rank:05d}.json"
    seen = {}

    def save_here(step):
        folders.begin(step, {own: b"%d" % step, f"more-{own}": b"%d" % step}, {"score": cluster.rank})
        folders.finish()

    def load():
        checked, digest = [], hashlib.file_digest

        def watched(file, name):
            checked.append(Path(file.name).name)
            return digest(file, name)

        hashlib.file_digest = watched
        folder, manifest = CheckpointFolders(root, cluster, 2, True).newest_intact()
        hashlib.file_digest = digest
        return {"folder": folder.name, "step": manifest["step"], "checked": checked}

    save_here(1)
    fsync = os.fsync
    if cluster.rank == 1:

        def full(handle):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = full
    try:
        save_here(2)
    except InputError as error:
        seen["failure"] = str(error)
    os.fsync = fsync
    seen["after failure"] = sorted(path.name for path in root.iterdir())
    seen["after failure, loaded"] = load()
    save_here(3)
    seen["loaded"] = load()
    cluster.barrier()
    if cluster.is_first:
        (root / "step-00000003" / "more-rank-00001.json").write_bytes(b"4")
    cluster.barrier()
    seen["damaged, loaded"] = load()
    print(json.dumps(seen))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("two-ranks") / "checkpoints"
    texts = processes.run([__file__, str(root)], 2)
    return root, [json.loads(text.splitlines()[-1]) for text in texts], texts[0]


def test_one_ranks_failure_is_that_of_all_and_nothing_is_published(two_ranks):
    _, ranks, _ = two_ranks
    for seen in ranks:
        assert seen["failure"].startswith(
            "the checkpoint of step 2 could not be written (rank 1: No space left on device); earlier ones are"
        )
        assert seen["after failure"] == ["latest", "step-00000001"]
        assert seen["after failure, loaded"]["step"] == 1


def test_the_manifest_holds_the_files_of_all_ranks_and_the_facts_of_the_first(two_ranks):
    root, _, _ = two_ranks
    manifest = json.loads((root / "step-00000003" / "manifest.json").read_text())
    assert manifest["score"] == 0
    assert sorted(manifest["files"]) == [
        "more-rank-00000.json",
        "more-rank-00001.json",
        "rank-00000.json",
        "rank-00001.json",
    ]


def test_the_ranks_share_the_work_of_verifying(two_ranks):
    root, ranks, _ = two_ranks
    shares = [seen["loaded"]["checked"] for seen in ranks]
    assert all(len(share) == 2 for share in shares)
    files = json.loads((root / "step-00000003" / "manifest.json").read_text())["files"]
    assert sorted(shares[0] + shares[1]) == sorted(files)


def test_all_ranks_agree_on_the_one_before_a_damaged_one(two_ranks):
    root, ranks, printed_by_first = two_ranks
    assert [seen["loaded"]["step"] for seen in ranks] == [3, 3]
    assert [seen["damaged, loaded"]["folder"] for seen in ranks] == ["step-00000001", "step-00000001"]
    assert printed_by_first.count("is damaged") == 1
    assert (
        f"checkpoint {root / 'step-00000003'} is damaged: more-rank-00001.json has other content than was written"
        in printed_by_first
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
