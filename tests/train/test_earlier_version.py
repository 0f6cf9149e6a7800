"""What version 0.1 left: its checkpoints and unfolded heads are refused in one line, its plain students are read."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from kdav_fast.cli import BAD_INPUT
from kdav_fast.student.file import read_file_card
from tests.train.stopped_run import STUDENT, change_manifest, error_line, kdav


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_it_began_is_refused_and_left_as_it_was(config, newest, capsys):
    change_manifest(newest, lambda manifest: manifest.pop("format"))
    before = contents(newest.parent)
    assert kdav(config) == BAD_INPUT
    assert error_line(capsys) == (
        f"kdav: error: {newest} is of a run that another version of kdav_fast began, which this one cannot continue; "
        "finish it with that version, or start anew in another run_dir"
    )
    assert contents(newest.parent) == before


@pytest.fixture
def complete(small_config, teacher_run, tmp_path):
    """The config of a complete run, as `make(embedding_width)` leaves it: its student's card says that width."""
    config = small_config(tmp_path / "run", model={"width": 1.0}, train={"epochs": 4})

    def make(embedding_width):
        shutil.copytree(teacher_run, config.run_dir)
        file = config.run_dir / STUDENT
        card = read_file_card(file).model_dump(mode="json") | {"embedding_width": embedding_width}
        del card["probabilistic"]  # which 0.1 did not know
        save_file(load_file(file), file, {"kdav_fast": json.dumps(card)})
        return config

    return make


def test_its_student_with_a_head_of_its_own_is_refused(complete, capsys):
    config = complete(12)
    before = contents(config.run_dir)
    assert kdav(config, "train") == BAD_INPUT
    assert "holds a student whose embedding head is not folded into its classifier" in error_line(capsys)
    assert contents(config.run_dir) == before


def test_its_student_without_a_head_is_read(complete, capsys):
    config = complete(None)
    assert kdav(config, "train") == 0
    assert f"{config.run_dir} is complete: 32 steps" in capsys.readouterr().out
