"""Runs of KDAV that the tests of faults share: 16 steps, and what they compute is always the same."""

import shutil

import pytest

from kdav_fast.train.loop import run_training
from tests.train.interrupt import stop_after


@pytest.fixture(scope="session")
def config_of(small_config, teacher_run):
    """The config of this run in some folder."""

    def build(run_dir, **train):
        return small_config(
            run_dir,
            teacher={"name": "cifar:resnet8", "checkpoint": str(teacher_run)},
            distiller={"name": "kdav", "memory_length": 100},
            train={"epochs": 2, **train},
        )

    return build


@pytest.fixture(scope="session")
def whole(config_of, made_once):
    """The folder of the run that met no fault."""
    return made_once("faultless", lambda folder: run_training(config_of(folder)))


@pytest.fixture(scope="session")
def stopped(config_of, made_once):
    """The folder of a run that was stopped; it holds the checkpoints of steps 8 and 13."""

    def stop(folder):
        with pytest.MonkeyPatch.context() as monkeypatch:
            stop_after(monkeypatch, 13)
            assert run_training(config_of(folder)) is None

    return made_once("stopped", stop)


@pytest.fixture
def config(config_of, stopped, tmp_path):
    """A run that was stopped, in a folder of this test."""
    shutil.copytree(stopped, tmp_path / "run")
    return config_of(tmp_path / "run")


@pytest.fixture
def newest(config):
    """Its newest checkpoint."""
    return config.run_dir / "checkpoints" / "step-00000013"
