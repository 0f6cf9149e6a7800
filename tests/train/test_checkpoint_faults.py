"""Whole runs on the digits whose checkpoints meet a fault: each ends like the run that met none, or in one line."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from kdav_fast.cli import BAD_INPUT, main
from kdav_fast.config import dump_config
from kdav_fast.errors import InputError
from kdav_fast.inference.evaluate import evaluate_file
from kdav_fast.tracking.metrics_log import MetricsLog, read_metrics
from kdav_fast.train.loop import run_training
from tests.train.interrupt import after_step, stop_after

PIECES, BUFFERS, STATE = "pieces-00000.safetensors", "buffers-00000.safetensors", "rank-00000.json"
DISTILLER, STUDENT = "distiller.safetensors", "student.safetensors"
BLOCK, MIB = 4096, 2**20


@pytest.fixture(scope="module")
def config_of(small_config, teacher_run):
    """The config of this module's one run of 16 steps, in some folder; what it computes is always the same."""

    def build(run_dir, **train):
        return small_config(
            run_dir,
            teacher={"name": "cifar:resnet8", "checkpoint": str(teacher_run)},
            distiller={"name": "kdav", "memory_length": 100},
            train={"epochs": 2, **train},
        )

    return build


@pytest.fixture(scope="module")
def whole(config_of, tmp_path_factory):
    """The folder of the run that met no fault."""
    config = config_of(tmp_path_factory.mktemp("whole") / "run")
    run_training(config)
    return config.run_dir


@pytest.fixture(scope="module")
def stopped(config_of, tmp_path_factory):
    """The folder of a run that was stopped; it holds the checkpoints of steps 8 and 13."""
    config = config_of(tmp_path_factory.mktemp("stopped") / "run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_after(monkeypatch, 13)
        assert run_training(config) is None
    return config.run_dir


@pytest.fixture
def config(config_of, stopped, tmp_path):
    """A run that was stopped, in a folder of this test."""
    shutil.copytree(stopped, tmp_path / "run")
    return config_of(tmp_path / "run")


@pytest.fixture
def newest(config):
    return config.run_dir / "checkpoints" / "step-00000013"


def kdav(config):
    """Exit code of `kdav distill`."""
    file = config.run_dir.with_name("config.yaml")
    file.write_text(dump_config(config))
    return main(["distill", str(file)])


def error_line(capsys):
    """The one line that `kdav` printed as it gave up."""
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("kdav: error: ")
    return line


def student_of(run_dir):
    return (run_dir / STUDENT).read_bytes()


# Damage.


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


# Malice.


class Planted:
    """Whoever unpickles it makes a folder."""

    def __init__(self, marker):
        self._marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self._marker),)


def raw_pickle(marker):
    return pickle.dumps(Planted(marker))


def torch_file(marker):
    file = marker.with_name("planted.pt")
    torch.save({"model": Planted(marker)}, file)
    return file.read_bytes()


@pytest.fixture
def marker(tmp_path):
    """Is there once a planted pickle was executed."""
    return tmp_path / "executed"


@pytest.mark.parametrize("make", [raw_pickle, torch_file])
def test_the_planted_pickles_are_dangerous(marker, tmp_path, make):
    (tmp_path / "file").write_bytes(make(marker))
    load = torch.load if make is torch_file else lambda file, **_: pickle.loads(file.read_bytes())
    load(tmp_path / "file", weights_only=False)
    assert marker.is_dir()


def plant(file, content):
    """Put other content in a file's place, and make the manifest agree."""
    file.write_bytes(content)
    manifest_file = file.with_name("manifest.json")
    manifest = json.loads(manifest_file.read_text())
    manifest["files"][file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    seal_manifest(manifest_file, manifest)


def seal_manifest(file, manifest):
    manifest.pop("sha256")
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    file.write_text(json.dumps(manifest))


def test_pickles_beside_the_files_of_a_checkpoint_are_not_executed(config, newest, whole, marker):
    plant(newest / STUDENT, raw_pickle(marker))  # whole weights, for evaluation: the run reads the pieces
    for number, name in enumerate(
        [
            "mp_rank_00_model_states.pt",
            "zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "latest.pt",
            "pieces-00000.pt",
            "rank-00000.pkl",
            "student.pt",
            "student.pth",
            "optimizer.bin",
            "pytorch_model.bin",
            "data.pkl",
            "average.safetensors",  # this run has none
        ]
    ):
        planted = (raw_pickle, torch_file)[number % 2](marker)
        for folder in (newest, newest.parent, config.run_dir):
            (folder / name).write_bytes(planted)
    assert run_training(config) is not None
    assert not marker.exists()
    assert student_of(config.run_dir) == student_of(whole)


@pytest.mark.parametrize(
    ("name", "make"),
    [(PIECES, torch_file), (BUFFERS, raw_pickle), (DISTILLER, torch_file), (STATE, raw_pickle)],
)
def test_a_pickle_in_place_of_a_file_that_the_manifest_confirms_is_refused(
    config, newest, capsys, marker, name, make
):
    plant(newest / name, make(marker))
    assert kdav(config) == BAD_INPUT
    assert not marker.exists()
    line = error_line(capsys)
    assert f"{newest} is what its manifest says, but no checkpoint that this version can read" in line
    assert newest.is_dir()


@pytest.mark.parametrize("make", [raw_pickle, torch_file])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_in_place_of_the_students_weights_is_not_executed(config, newest, marker, make):
    plant(newest / STUDENT, make(marker))
    with pytest.raises(InputError, match=rf"{newest / STUDENT}"):
        evaluate_file(config.run_dir, ["device=cpu"])
    assert not marker.exists()


def test_a_file_that_the_manifest_does_not_name_is_not_read(config, newest, capsys):
    file = newest / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["files"][PIECES]
    seal_manifest(file, manifest)
    assert kdav(config) == BAD_INPUT
    assert f"{PIECES} is not in the manifest" in error_line(capsys)


# A full disk.


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


# Asynchronous writing.


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
