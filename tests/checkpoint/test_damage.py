"""Which checkpoint is found, and what is made of damaged ones."""

import errno
import hashlib
import json
import os
import shutil

import pytest

from kdav_fast.errors import InputError
from tests.checkpoint.small_folders import PIECES, STATE, flip_bit, folders_in, save, snapshot, steps_in


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoints"


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
    assert (root / "latest").read_text() == "step-00000002\n"


def test_the_pointer_names_the_one_before_a_damaged_one(root):
    for step in (1, 2):
        save(folders_in(root), step)
    flip_bit(root / "step-00000002" / PIECES, 3)
    folders_in(root).newest_intact()
    assert (root / "latest").read_text() == "step-00000001\n"


def test_a_disk_that_cannot_be_written_to_can_be_read_from(root, monkeypatch):
    save(folders_in(root), 1)
    (root / "latest").unlink()

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", refuse)
    assert folders_in(root).newest_intact()[1]["step"] == 1
