"""Runs with steps that are not finite: each of them leaves all state as it was, whenever the host hears of it."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from kdav_fast.checkpoint.manifest import read_manifest
from kdav_fast.config import dump_config
from kdav_fast.distillers.kdav import KDAV
from kdav_fast.tracking.metrics_log import read_metrics
from kdav_fast.train.loop import run_training
from tests.train import processes
from tests.train.interrupt import after_step
from tests.train.poisoned_run import poison_loss

STEPS, PER_EPOCH = 16, 8
SKIPPED = (1, 4, 5, 6, 8, 9, 16)
"""The first, several in a row, one at which the run is saved and one after that, and the last."""
PROGRAM = str(processes.REPOSITORY / "tests/train/poisoned_run.py")


class Killed(BaseException):
    """As no program expects it."""


@pytest.fixture
def config_of(small_config, teacher_run, tmp_path):
    """The config of a run that has everything a step may change; it is saved every so many steps."""

    def build(name, save_every, **train):
        return small_config(
            tmp_path / name,
            teacher={"name": "cifar:resnet8", "checkpoint": str(teacher_run)},
            distiller={"name": "kdav", "memory_length": 100, "prototypes": "running", "weight_label": 0.5},
            train={
                "epochs": STEPS / PER_EPOCH,
                "save_every": save_every / PER_EPOCH,
                "log_every": PER_EPOCH,
                "evaluate_every": 0,
                "keep_checkpoints": STEPS,
                "ema_decay": 0.5,
                **train,
            },
        )

    return build


@pytest.fixture
def poisoned(monkeypatch):
    """In some steps, the loss is not a number."""
    monkeypatch.setattr(KDAV, "forward", KDAV.forward)  # so that it comes back
    poison_loss(SKIPPED)


def state(run_dir, step) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    return {
        f"{file.name}:{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_each_step_was_left_out(run_dir):
    for step in range(2, STEPS + 1):
        assert same(state(run_dir, step), state(run_dir, step - 1)) == (step in SKIPPED), step
    counts = [
        read_manifest(run_dir / "checkpoints" / f"step-{step:08d}")[0]["skipped_steps"]
        for step in range(1, STEPS + 1)
    ]
    assert counts == [sum(skipped <= step for skipped in SKIPPED) for step in range(1, STEPS + 1)]


def assert_same_end(found, expected):
    assert same(state(found.run_dir, STEPS), state(expected.run_dir, STEPS))
    ends = [read_metrics(config.run_dir)[-2:] for config in (found, expected)]
    clocks = ("images_per_second", "data_wait_share")
    lines = [[{k: v for k, v in line.items() if k not in clocks} for line in end] for end in ends]
    assert lines[0] == lines[1]
    assert lines[0][0]["skipped_steps"] == len(SKIPPED)


@pytest.mark.usefixtures("poisoned")
def test_a_skipped_step_changes_nothing_whenever_it_is_heard_of(config_of, monkeypatch, capsys):
    at_once = config_of("at once", 1)
    run_training(at_once)
    said = "loss or gradient not finite, skipped"
    numbers = [int(line.split()[1][:-1]) for line in capsys.readouterr().out.splitlines() if said in line]
    assert numbers == list(SKIPPED)
    assert_each_step_was_left_out(at_once.run_dir)
    late = config_of("late", PER_EPOCH)
    run_training(late)
    assert_same_end(late, at_once)

    def kill():
        raise Killed

    killed = config_of("killed", PER_EPOCH)
    after_step(monkeypatch, 9, kill)  # a skipped one, not yet heard of, after one that was saved
    with pytest.raises(Killed):
        run_training(killed)
    after_step(monkeypatch, 1000, kill)
    run_training(killed)
    assert_same_end(killed, at_once)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_it_changes_nothing_on_any_process_though_one_alone_met_it(config_of, zero_stage):
    def run(config, *more):
        file = config.run_dir.with_suffix(".yaml")
        file.write_text(dump_config(config))
        group = processes.fork([PROGRAM, str(file), "loss", "1", str(list(SKIPPED)), *more], world=2)
        texts = processes.outputs(group)
        return [process.returncode for process in group], "\n".join(texts)

    at_once = config_of("at once", 1, zero_stage=zero_stage)
    codes, text = run(at_once)
    assert codes == [0, 0], text
    assert_each_step_was_left_out(at_once.run_dir)
    killed = config_of("killed", PER_EPOCH, zero_stage=zero_stage)
    codes, text = run(killed, "9")
    assert -signal.SIGKILL in codes, text
    codes, text = run(killed)
    assert codes == [0, 0], text
    assert_same_end(killed, at_once)
