"""A disk that fills up under a run ends it in one line; with room again, the same command continues it."""

import os
import subprocess

import pytest

from kdav_fast.cli import BAD_INPUT
from kdav_fast.errors import InputError
from kdav_fast.tracking.metrics_log import MetricsLog, read_metrics
from tests.train.interrupt import after_step
from tests.train.stopped_run import STUDENT, error_line, kdav, student_of

BLOCK, MIB = 4096, 2**20


class SmallDisk:
    """A file system of its own, in memory."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={MIB}", "tmpfs", folder]
        tried = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if tried.returncode:
            pytest.skip(f"cannot mount a small file system: {tried.stderr.strip()}")

    def resize(self, size):
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], check=True)

    def fill(self):
        """Leave no free block; files may still grow to the end of their last one."""
        with pytest.raises(OSError, match="No space left on device"):
            (self.folder / "ballast").write_bytes(bytes(2 * MIB))

    def unmount(self):
        subprocess.run(["umount", "--lazy", self.folder], check=True)  # even if a failed test has files open


@pytest.fixture
def disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.unmount()


def blocks(files):
    return sum(-(-file.stat().st_size // BLOCK) * BLOCK for file in files)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_fills_up_during_a_save_keeps_the_earlier_checkpoint(
    config_of, disk, whole, capsys, asynchronous
):
    # Room for two checkpoints, those of steps 0 and 4, and half a third.
    one = blocks((whole / "checkpoints" / "step-00000008").iterdir())
    beside = [*whole.glob("tensorboard/*"), whole / "data.json"]
    disk.resize(5 * one // 2 + blocks(beside) + 4 * BLOCK)
    config = config_of(disk.folder / "run", save_every=0.5, async_checkpoints=asynchronous)
    assert kdav(config) == BAD_INPUT
    line = error_line(capsys)
    assert "the checkpoint of step 8 could not be written (" in line
    assert "No space left on device); earlier ones are as they were" in line
    checkpoints = config.run_dir / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "latest",
        "step-00000000",
        "step-00000004",
    ]
    assert not (config.run_dir / STUDENT).exists()

    disk.resize(16 * MIB)
    assert kdav(config) == 0
    assert f"continuing {config.run_dir} after step 4\n" in capsys.readouterr().out
    assert student_of(config.run_dir) == student_of(whole)
    assert [line["step"] for line in read_metrics(config.run_dir)] == [
        line["step"] for line in read_metrics(whole)
    ]


def test_a_disk_that_fills_up_between_saves_ends_the_run_in_one_line(
    config_of, disk, whole, monkeypatch, capsys
):
    config = config_of(disk.folder / "run", save_every=0, log_every=1)
    after_step(monkeypatch, 5, disk.fill)
    assert kdav(config) == BAD_INPUT
    line = error_line(capsys)
    assert f"run_dir {config.run_dir}: the metrics of step " in line
    assert "could not be written (No space left on device)" in line

    monkeypatch.undo()
    disk.resize(16 * MIB)
    assert kdav(config) == 0
    assert student_of(config.run_dir) == student_of(whole)
    assert len([line for line in read_metrics(config.run_dir) if "train/loss" in line]) == 16


@pytest.mark.parametrize(
    ("values", "lines_of_the_last_step"),
    [({"note": "x" * 500}, 0), ({f"v{number}": 0.0 for number in range(40)}, 1)],
    ids=["metrics.jsonl is the first to fail", "the events are"],
)
def test_metrics_on_a_full_disk_are_an_input_error_and_closing_is_none(disk, values, lines_of_the_last_step):
    run_dir, written = disk.folder / "run", 0

    def write_on():
        nonlocal written
        with MetricsLog(run_dir, None) as log:
            log.write(0, values)
            disk.fill()
            for step in range(1, 1000):
                log.write(step, values)
                written = step

    with pytest.raises(InputError, match=r"the metrics of step \d+ could not be written \(No space left on"):
        write_on()
    assert written > 0
    assert len(read_metrics(run_dir)) == 1 + written + lines_of_the_last_step
    disk.resize(2 * MIB)
    with MetricsLog(run_dir, written) as log:
        log.write(written + 1, values)
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(written + 2))
