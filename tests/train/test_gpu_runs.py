"""Whole runs on a GPU: every ZeRO stage and precision, against the same run on the CPU."""

import pytest

from kdav_fast.tracking.metrics_log import read_metrics
from kdav_fast.train.loop import run_training
from tests.train.interrupt import stop_after

pytestmark = pytest.mark.gpu


@pytest.fixture
def config_on(small_config, teacher_run, tmp_path):
    """The config of a KDAV run without augmentation, whose random numbers differ between devices."""

    def build(device, name=None, sharded=False, **train):
        return small_config(
            tmp_path / (name or device),
            device=device,
            teacher={"name": "cifar:resnet8", "checkpoint": str(teacher_run), "sharded": sharded},
            distiller={"name": "kdav", "memory_length": 100},
            data={"crop": "none"},
            train={"epochs": 1, "log_every": 1, "precision": "fp32", **train},
        )

    return build


def losses(config):
    return [line["train/loss"] for line in read_metrics(config.run_dir) if "train/loss" in line]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_losses_are_those_of_the_cpu(config_on, zero_stage, precision):
    reference = config_on("cpu")
    run_training(reference)
    config = config_on("cuda", zero_stage=zero_stage, precision=precision, sharded=zero_stage == 3)
    run_training(config)
    found, expected = losses(config), losses(reference)
    if precision == "fp32":
        assert found == pytest.approx(expected, rel=5e-3)
    elif precision == "bf16":  # training amplifies what half precision rounds off
        assert found[0] == pytest.approx(expected[0], rel=2e-2)
        assert found == pytest.approx(expected, rel=0.3)
    else:  # the first steps are skipped, until the loss's scale fits
        assert 4 <= len(found) <= 8
        assert found[-1] < found[0]


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_stopped_run_goes_on_where_it_was(config_on, monkeypatch, zero_stage):
    options = {"zero_stage": zero_stage, "precision": "fp16", "ema_decay": 0.5, "mixup": 0.2}
    whole = config_on("cuda", "whole", **options)
    run_training(whole)
    stopped = config_on("cuda", "stopped", **options)
    stop_after(monkeypatch, 3)
    assert run_training(stopped) is None
    stop_after(monkeypatch, 1000)
    run_training(stopped)
    # Sums on a GPU may come in another order.
    assert losses(stopped) == pytest.approx(losses(whole), rel=2e-2)
