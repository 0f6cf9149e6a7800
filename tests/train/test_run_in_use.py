"""A run's folder while the run has it, and after."""

import shutil
from pathlib import Path

import pytest

from kdav_fast.demo import run_demo
from kdav_fast.errors import InputError
from kdav_fast.runtime.process_identity import ProcessIdentity
from kdav_fast.runtime.run_lock import FILE_NAME, RunLock
from kdav_fast.student.export import export_safetensors
from kdav_fast.student.file import read_student
from kdav_fast.tracking.metrics_log import read_metrics
from kdav_fast.tracking.report import write_report
from kdav_fast.train.loop import run_training
from tests.train.interrupt import after_step, stop_after


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_command_again_is_refused_and_changes_nothing(small_config, tmp_path, monkeypatch):
    config = small_config(tmp_path / "run", train={"epochs": 1, "save_every": 0.5})
    refusals = []

    def start_again():
        before = contents(config.run_dir)
        with pytest.raises(InputError, match="is in use by process .* on host .* since ") as caught:
            run_training(config)
        refusals.append(str(caught.value))
        assert contents(config.run_dir) == before

    after_step(monkeypatch, 6, start_again)
    assert run_training(config) is not None
    assert len(refusals) == 1
    assert not (config.run_dir / FILE_NAME).exists()
    assert [line["step"] for line in read_metrics(config.run_dir)] == [3, 6, 8, 8]


def test_other_commands_read_a_running_run(small_config, tmp_path, monkeypatch):
    config = small_config(tmp_path / "run", train={"epochs": 1, "save_every": 0.5})

    def look():
        read_student(config.run_dir)
        write_report({"run": config.run_dir}, tmp_path / "report", title="running")
        export_safetensors(config.run_dir, tmp_path / "exported.safetensors")

    after_step(monkeypatch, 6, look)
    assert run_training(config) is not None


@pytest.mark.parametrize("end", ["bad input", "stopped", "failed"])
def test_every_end_lets_the_folder_go(small_config, teacher_run, tmp_path, monkeypatch, end):
    config = small_config(tmp_path / "run", train={"epochs": 1})
    if end == "bad input":
        with pytest.raises(InputError, match="impl is 'triton'"):
            run_training(
                small_config(
                    tmp_path / "run",
                    teacher={"name": "cifar:resnet8", "checkpoint": str(teacher_run)},
                    distiller={"name": "kdav", "impl": "triton"},
                )
            )
        assert not config.run_dir.exists()
        return
    if end == "stopped":
        stop_after(monkeypatch, 2)
        assert run_training(config) is None
    else:
        after_step(monkeypatch, 2, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_training(config)
    assert not list(config.run_dir.glob(f"{FILE_NAME}*"))


def test_a_run_that_was_succeeded_while_it_was_frozen_writes_nothing_more(
    small_config, tmp_path, monkeypatch
):
    config = small_config(tmp_path / "run", train={"epochs": 1, "log_every": 1, "save_every": 0.25})
    successor = ProcessIdentity.here()._replace(process=1, host="successor")

    def succeed():
        (config.run_dir / FILE_NAME).write_text(successor.as_json())
        seen.update(contents(config.run_dir))

    seen = {}
    after_step(monkeypatch, 3, succeed)
    with pytest.raises(InputError, match="taken over by process 1 on host successor"):
        run_training(config)
    assert seen
    assert contents(config.run_dir) == seen


def test_a_folder_removed_while_the_run_goes_on_is_not_made_again(small_config, tmp_path, monkeypatch):
    config = small_config(tmp_path / "run", train={"epochs": 1})
    after_step(monkeypatch, 1, lambda: shutil.rmtree(config.run_dir))
    with pytest.raises(InputError, match="was removed"):
        run_training(config)
    assert not config.run_dir.exists()


def test_the_demonstration_too(tmp_path):
    with RunLock(tmp_path / "demo"), pytest.raises(InputError, match="in use by process"):
        run_demo(tmp_path / "demo")
