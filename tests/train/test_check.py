"""`--check`: all that comes before the first step, and no trace of it."""

import pytest
import yaml

from kdav_fast.cli import main
from kdav_fast.config import dump_config
from kdav_fast.errors import InputError
from kdav_fast.train.check import check_training
from kdav_fast.train.loop import run_training
from tests.train.interrupt import stop_after
from tests.train.processes import run as run_processes


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_check_finds_what_the_run_would_have_and_writes_nothing(
    small_config, teacher_run, tmp_path, capsys
):
    config = small_config(
        tmp_path / "runs" / "run",
        teacher={"name": "cifar:resnet8", "checkpoint": str(teacher_run)},
        distiller={"name": "kdav", "memory_length": 100},
    )
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    before = snapshot(tmp_path)
    assert main(["distill", str(file), "--check", "train.epochs=2"]) == 0
    assert snapshot(tmp_path) == before
    said = capsys.readouterr().out
    assert "data: 240 training and 900 evaluation images, 10 classes, 8 pixels" in said
    assert "run: 16 steps, 2 epochs of 8; batches of 32 over 1 process; fp32 on cpu, ZeRO stage 0" in said
    assert "teacher: cifar:resnet8, 78,042 parameters" in said
    assert "first batch: loss " in said
    assert "would be made; the run would begin" in said


def test_a_check_beside_a_run_says_whether_it_could_be_continued(small_config, tmp_path, monkeypatch, capsys):
    config = small_config(tmp_path / "run")
    stop_after(monkeypatch, 5)
    assert run_training(config) is None
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-00000000\n")  # a run would mend it
    before = snapshot(tmp_path)
    check_training(config)
    assert "would be continued after step 5 of 24" in capsys.readouterr().out
    with pytest.raises(InputError, match="optimizer.lr is 0.1 there and 0.2 here"):
        check_training(small_config(tmp_path / "run", optimizer={"lr": 0.2}))
    assert snapshot(tmp_path) == before
    stop_after(monkeypatch, 1000)
    run_training(config)
    before = snapshot(tmp_path)
    capsys.readouterr()
    check_training(config)
    assert "is complete; there is nothing to do" in capsys.readouterr().out
    check_training(small_config(tmp_path / "run", train={"epochs": 4}), extend=True)
    assert "would be continued after step 24 of 32" in capsys.readouterr().out
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"checkpoint": "nowhere.safetensors"}}, "nowhere.safetensors"),
        ({"teacher": {"name": "cifar:resnet8"}, "distiller": {"name": "kd"}}, "the teacher has no weights"),
        ({"run_dir": "/dev/null/run"}, "is no folder"),
    ],
)
def test_a_check_stops_at_what_would_stop_the_run(small_config, tmp_path, changes, message):
    run_dir = changes.pop("run_dir", tmp_path / "run")
    with pytest.raises(InputError, match=message):
        check_training(small_config(run_dir, **changes))
    assert not (tmp_path / "run").exists()


def test_several_processes_check_together(small_config, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(small_config(tmp_path / "run", data={"train_subset": 64})))
    texts = run_processes(["-m", "kdav_fast", "train", str(file), "--check"], 2)
    assert "over 2 processes" in texts[0]
    assert "checked; nothing was written" in texts[0]
    assert "checked" not in texts[1]
    assert yaml.safe_load(file.read_text())["train"]["epochs"] == 3
    assert not (tmp_path / "run").exists()
