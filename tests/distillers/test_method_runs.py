"""Whole runs of every method there is, and of those that come with the tests: broken off, exported, sharded."""

import pytest
import torch
from safetensors.torch import load_file

from kdav_fast.checkpoint.manifest import read_manifest
from kdav_fast.config import dump_config
from kdav_fast.config.method import method_names
from kdav_fast.models import build_stock
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.student.export import export_safetensors
from kdav_fast.tracking.metrics_log import read_metrics
from kdav_fast.train.checkpoints import Checkpoints
from kdav_fast.train.folder import results
from kdav_fast.train.loop import run_training
from kdav_fast.train.setup import set_up
from tests.distillers import added_methods
from tests.train import processes
from tests.train.interrupt import after_step

METHODS = [*method_names(), *added_methods.NAMES]
each_method = pytest.mark.parametrize(
    "method",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in method_names()), *added_methods.NAMES],
)
"""Those of the tests, which ask for everything, stand for the others where it has to be quick."""
TRAINED = {
    "epochs": 2,
    "batch_size": 16,
    "log_every": 1,
    "evaluate_every": 2,
    "save_every": 0.5,
    "ema_decay": 0.5,
}
"""8 steps an epoch, saves after each fourth."""
STEPS = 16
SHARES = 6
"""Of the methods, each in two processes of its own: all in one pair would take longer than a test may."""
SHORT = {"sskd": {"head_epochs": 1.0}}
"""Of methods whose phases are long."""


class Killed(BaseException):
    """As no program expects it."""


@pytest.fixture(scope="module", autouse=True)
def _added():
    with added_methods.added():
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_report():
    """Curves take twice as long as such a run, and are the same for every method."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(results, "write_report", lambda *runs, **title: None)
        yield


@pytest.fixture(scope="module")
def make_config(small_config, teacher_run, tmp_path_factory):
    """The config of a small run of a method."""
    folder = tmp_path_factory.mktemp("methods")

    def make(method, name, teacher=None, **train):
        return small_config(
            folder / f"{method}-{name}",
            teacher={"name": "cifar:resnet8", "checkpoint": str(teacher_run), **(teacher or {})},
            distiller={"name": method, **SHORT.get(method, {})},
            data={"train_subset": 128, "crop": "none"},
            train={**TRAINED, **train},
        )

    return make


@pytest.fixture(scope="module")
def whole(make_config):
    """The config of a run that came to its end, and its accuracy; each is made once."""
    made = {}

    def get(method):
        if method not in made:
            config = make_config(method, "whole")
            made[method] = config, run_training(config)
        return made[method]

    return get


def losses_of(run_dir):
    return [line["train/loss"] for line in read_metrics(run_dir) if "train/loss" in line]


@each_method
def test_killed_and_continued_equals_unbroken(method, whole, make_config, monkeypatch):
    config, expected = make_config(method, "killed"), whole(method)[0]

    def kill():
        raise Killed

    after_step(monkeypatch, 7, kill)  # three steps after it was saved
    with pytest.raises(Killed):
        run_training(config)
    after_step(monkeypatch, 1000, kill)
    assert run_training(config) is not None
    for name in ("student.safetensors", f"checkpoints/step-{STEPS:08d}/student.safetensors"):
        assert (config.run_dir / name).read_bytes() == (expected.run_dir / name).read_bytes(), name
    last, other = (read_manifest(c.run_dir / f"checkpoints/step-{STEPS:08d}")[0] for c in (config, expected))
    assert last["files"] == other["files"]  # with their checksums
    assert losses_of(config.run_dir) == losses_of(expected.run_dir)


@each_method
def test_the_export_is_the_stock_architecture_and_answers_as_what_was_evaluated(method, whole, tmp_path):
    config, accuracy = whole(method)
    export_safetensors(config.run_dir, tmp_path / "student.safetensors")
    stock = build_stock(config.model.name, 10, width=config.model.width).eval()
    stock.load_state_dict(load_file(tmp_path / "student.safetensors"), strict=True)

    run = set_up(config, start_cluster("cpu"))
    assert Checkpoints(run, read_only=True).restore().step == STEPS
    evaluated, right, images = run.evaluated_student.eval(), 0, 0
    with torch.no_grad():
        for batch in run.loaders.evaluation:
            scores = stock(batch.images)
            torch.testing.assert_close(scores, evaluated(batch.images).logits, rtol=1e-3, atol=1e-3)
            right += (scores.argmax(1) == batch.labels)[batch.valid].sum().item()
            images += batch.valid.sum().item()
    assert 100 * right / images == pytest.approx(accuracy.top1, abs=0.12)  # a tie may go either way


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_sharded_over_two_processes_every_method_reaches_the_same_losses(share, make_config):
    methods, runs, files = METHODS[share::SHARES], {}, []
    for method in methods:
        for stage in (0, 3):
            config = make_config(
                method,
                f"zero{stage}",
                {"sharded": stage == 3},
                epochs=1,
                zero_stage=stage,
                sync_batchnorm=True,
            )
            runs[method, stage] = config.run_dir
            files.append(config.run_dir.with_suffix(".yaml"))
            files[-1].write_text(dump_config(config))
    processes.run([str(processes.REPOSITORY / "tests/distillers/added_run.py"), *map(str, files)], 2)
    for method in methods:
        plain, sharded = (losses_of(runs[method, stage]) for stage in (0, 3))
        assert len(plain) == STEPS // 2
        assert sharded[0] == pytest.approx(plain[0], rel=2e-6), method
        assert sharded == pytest.approx(plain, rel=2e-4), method
