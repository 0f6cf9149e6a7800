"""Pickles that somebody planted in a run's checkpoints: none is executed."""

import os
import pickle

import pytest
import torch

from kdav_fast.checkpoint.manifest import record_of
from kdav_fast.cli import BAD_INPUT
from kdav_fast.errors import InputError
from kdav_fast.inference.evaluate import evaluate_file
from kdav_fast.train.loop import run_training
from tests.train.stopped_run import (
    BUFFERS,
    DISTILLER,
    PIECES,
    STATE,
    STUDENT,
    change_manifest,
    error_line,
    kdav,
    student_of,
)


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
    change_manifest(file.parent, lambda manifest: manifest["files"].update({file.name: record_of(content)}))


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
    change_manifest(newest, lambda manifest: manifest["files"].pop(PIECES))
    assert kdav(config) == BAD_INPUT
    assert f"{PIECES} is not in the manifest" in error_line(capsys)
