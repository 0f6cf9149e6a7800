"""Whole runs whose checkpoints are damaged or written late: they end like the one without a fault, or in one line."""

import os
import threading
from pathlib import Path

import pytest

from kdav_fast.cli import BAD_INPUT
from kdav_fast.train.loop import run_training
from tests.train.interrupt import after_step
from tests.train.stopped_run import BUFFERS, DISTILLER, PIECES, STATE, STUDENT, error_line, kdav, student_of


def flip_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        (PIECES, lambda file: os.truncate(file, 5000), "has 5000 bytes instead of"),
        (PIECES, flip_bit, "has other content than was written"),
        (STATE, Path.unlink, "No such file or directory"),
        ("manifest.json", Path.unlink, "No such file or directory"),
        pytest.param(BUFFERS, flip_bit, "has other content", marks=pytest.mark.slow),
        pytest.param(DISTILLER, flip_bit, "has other content", marks=pytest.mark.slow),
        pytest.param(STUDENT, flip_bit, "has other content", marks=pytest.mark.slow),
        pytest.param(STATE, flip_bit, "has other content", marks=pytest.mark.slow),
        pytest.param("manifest.json", flip_bit, "manifest", marks=pytest.mark.slow),
    ],
    ids=[
        "truncated pieces",
        "flipped bit in pieces",
        "missing rank file",
        "missing manifest",
        "flipped bit in buffers",
        "flipped bit in distiller",
        "flipped bit in student",
        "flipped bit in rank file",
        "flipped bit in manifest",
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    config, newest, whole, capsys, file, damage, told
):
    damage(newest / file)
    assert run_training(config) is not None
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if "is damaged" in line]
    assert line.startswith(f"checkpoint {newest} is damaged: {file}")
    assert told in line
    assert f"using {newest.with_name('step-00000008')} instead\n" in printed
    assert f"continuing {config.run_dir} after step 8\n" in printed
    assert student_of(config.run_dir) == student_of(whole)
    kept = sorted(path.name for path in newest.parent.iterdir())
    assert kept == ["latest", "step-00000008", "step-00000016"]


@pytest.mark.parametrize(
    "names_absent",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["names an absent folder", "is missing"],
)
def test_the_newest_checkpoint_is_used_though_the_pointer(config, newest, whole, capsys, names_absent):
    pointer = newest.with_name("latest")
    pointer.unlink()
    if names_absent:
        pointer.write_text("step-00000099\n")
    assert run_training(config) is not None
    printed = capsys.readouterr().out
    assert (f"{pointer} names 'step-00000099', which is not there" in printed) == names_absent
    assert f"continuing {config.run_dir} after step 13\n" in printed
    assert student_of(config.run_dir) == student_of(whole)


def test_if_all_are_damaged_the_run_ends_in_one_line_and_touches_nothing(config, newest, capsys):
    for folder in newest.parent.glob("step-*"):
        flip_bit(folder / PIECES)
    files = [config.run_dir / "metrics.jsonl", *newest.parent.rglob("*.*")]
    before = {file: file.read_bytes() for file in files}
    assert kdav(config) == BAD_INPUT
    assert f"every checkpoint in {newest.parent} is damaged" in error_line(capsys)
    assert {file: file.read_bytes() for file in files} == before


def test_checkpoints_written_in_the_background_are_the_same(config_of, whole, tmp_path, monkeypatch):
    config = config_of(tmp_path / "run", async_checkpoints=True)
    step_9_taken, fsync = threading.Event(), os.fsync

    def wait_and_flush(handle):
        file = Path(f"/proc/self/fd/{handle}").readlink()
        if file == config.run_dir / "checkpoints" / "step-00000008.tmp" / PIECES:
            assert step_9_taken.wait(60), "training waits for the checkpoint of step 8"
        fsync(handle)

    monkeypatch.setattr(os, "fsync", wait_and_flush)
    after_step(monkeypatch, 9, step_9_taken.set)
    run_training(config)
    files = [path.relative_to(whole) for path in (whole / "checkpoints").rglob("*") if path.is_file()]
    assert len(files) == 13
    for file in [*files, Path(STUDENT)]:
        assert (config.run_dir / file).read_bytes() == (whole / file).read_bytes(), file
