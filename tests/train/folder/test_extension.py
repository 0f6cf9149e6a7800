"""Training a finished run further, and what must be refused."""

import json
from math import cos, pi

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kdav_fast.config import DataConfig
from kdav_fast.errors import InputError
from kdav_fast.student.file import StudentCard, read_student, write_student
from kdav_fast.tracking.metrics_log import read_metrics
from kdav_fast.train.folder.extension import is_complete
from kdav_fast.train.loop import run_training
from tests.train.interrupt import stop_after


def weights_of(run):
    return {name: tensor.tolist() for name, tensor in load_file(run / "student.safetensors").items()}


def test_two_extensions_in_a_row_equal_one_long_run(small_config, teacher_run, tmp_path, monkeypatch, capsys):
    """With a schedule that does not know the end; KDAV's memory and mixing's random state are continued too."""
    sections = {
        "teacher": {"name": "cifar:resnet8", "checkpoint": str(teacher_run)},
        "distiller": {"name": "kdav", "memory_length": 100},
        "schedule": {"name": "step", "milestones": [1.5], "warmup_epochs": 0.5},
    }

    def config(name, epochs):
        train = {"epochs": epochs, "mixup": 0.4, "ema_decay": 0.9, "log_every": 4}
        return small_config(tmp_path / name, **sections, train=train)

    run_training(config("whole", 4))
    run = tmp_path / "run"
    run_training(config("run", 1))
    assert read_student(run)[1].step == 8
    stop_after(monkeypatch, 5)
    assert run_training(config("run", 2), extend=True) is None
    assert read_student(run)[1].step == 8  # until the extension is complete
    stop_after(monkeypatch, 1000)
    assert run_training(config("run", 2)) is not None  # recorded: the same command without the flag
    assert read_student(run)[1].step == 16
    capsys.readouterr()
    assert run_training(config("run", 4), extend=True) is not None
    assert (
        "from 2 to 4 epochs, after step 16 of 32: as if it had been begun with them"
        in capsys.readouterr().out
    )

    assert weights_of(run) == weights_of(tmp_path / "whole")
    losses = [
        {line["step"]: line["train/loss"] for line in read_metrics(tmp_path / name) if "train/loss" in line}
        for name in ("run", "whole")
    ]
    assert losses[0].keys() == losses[1].keys()
    assert all(losses[0][step] == losses[1][step] for step in losses[0] if step != 16)
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["epochs"] == 4
    assert json.loads((run / "per_class.json").read_text())["step"] == 32
    run_training(config("run", 4), extend=True)  # nothing left to extend
    assert "is complete: 32 steps" in capsys.readouterr().out


def test_a_schedule_that_knows_the_end_goes_on_as_the_longer_one(small_config, tmp_path, capsys):
    def config(epochs):
        train = {"epochs": epochs, "log_every": 1, "evaluate_every": 0}
        return small_config(tmp_path / "run", schedule={"name": "cosine"}, train=train)

    run_training(config(1))
    with pytest.raises(
        InputError, match="train.epochs is 1.0 there and 2.0 here; .*--extend to train it further"
    ):
        run_training(config(2))
    run_training(config(2), extend=True)
    assert "the learning rates are those of 'cosine' over all 16 steps" in capsys.readouterr().out
    rates = {line["step"]: line["lr"] for line in read_metrics(tmp_path / "run") if "lr" in line}
    expected = [0.05 * (1 + cos(pi * step / 8)) for step in range(8)]
    expected += [0.05 * (1 + cos(pi * step / 16)) for step in range(8, 16)]
    assert [rates[step] for step in range(1, 17)] == pytest.approx(expected)


def test_what_cannot_be_extended_is_refused_and_left_as_it_was(small_config, tmp_path):
    def config(epochs, **changes):
        return small_config(tmp_path / "run", train={"epochs": epochs, "save_every": 0}, **changes)

    with pytest.raises(InputError, match="holds no run that could be extended; drop --extend"):
        run_training(config(2), extend=True)
    assert not (tmp_path / "run").exists()
    run_training(config(1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="no checkpoint of its training .*so it cannot be extended"):
        run_training(config(2), extend=True)
    with pytest.raises(
        InputError, match="train.epochs is 1.0 there and 0.5 here; a run can be extended but not"
    ):
        run_training(config(0.5), extend=True)
    with pytest.raises(InputError, match="optimizer.lr is 0.1 there and 0.2 here"):
        run_training(config(2, optimizer={"lr": 0.2}), extend=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("told", "reached", "wanted", "complete"),
    [
        (2.0, 2.0, 2.0, True),
        (2.0, 2.0, 2.5, False),
        (None, 2.0, 2.0, True),
        (None, 1.9999, 2.0, True),
        (None, 2.0, 2.5, False),
        (0.001, 1.0, 0.001, True),
    ],
)
def test_a_student_of_fewer_epochs_is_not_complete(small_config, tmp_path, told, reached, wanted, complete):
    """Files of earlier versions do not tell the epochs that their run was to take."""
    card = StudentCard(
        name="cifar:resnet8",
        width=1.0,
        classes=("a", "b"),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        embedding_width=None,
        data=DataConfig(),
        distiller="none",
        step=3,
        epoch=reached,
        epochs=told,
    )
    write_student(tmp_path / "student.safetensors", {"a": torch.zeros(1)}, card)
    assert is_complete(small_config(tmp_path, train={"epochs": wanted})) is complete
