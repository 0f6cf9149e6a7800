"""Methods that ask for everything at once, in whole runs: killed or stopped in each phase, they end as if unbroken."""

from signal import SIGKILL, SIGTERM
from typing import NamedTuple

import pytest

from kdav_fast.checkpoint.manifest import read_manifest
from kdav_fast.config import dump_config
from kdav_fast.runtime.stopping import STOPPED
from kdav_fast.tracking.metrics_log import read_metrics
from tests.distillers import added_methods
from tests.train import processes

TIMES = {"images_per_second", "data_wait_share"}
PROGRAM = str(processes.REPOSITORY / "tests" / "distillers" / "added_run.py")


class Setting(NamedTuple):
    world: int
    zero_stage: int
    loader: str
    signal: int
    """By which it is broken off."""


SETTINGS = {
    "one": Setting(1, 0, "torchvision", SIGTERM),
    "one-zero3": Setting(1, 3, "dali", SIGKILL),
    "two": Setting(2, 0, "dali", SIGTERM),
    "two-zero3": Setting(2, 3, "dali", SIGKILL),
}


class Run:
    """A run of a method, and the attempts at it."""

    def __init__(self, config, world: int) -> None:
        self.folder, self._world = config.run_dir, world
        self._file = self.folder.with_suffix(".yaml")
        self._file.write_text(dump_config(config))

    def attempt(self, *strike: object) -> tuple[list[int], str]:
        """Exit codes, and what all ranks printed."""
        ranks = processes.fork([PROGRAM, str(self._file), *map(str, strike)], self._world)
        output = "".join(processes.outputs(ranks, timeout=200))
        return [rank.returncode for rank in ranks], output

    def end(self) -> str:
        codes, output = self.attempt()
        assert codes == [0] * self._world, output
        return output

    @property
    def lines(self) -> list[dict]:
        """Of the log, but for times."""
        lines = read_metrics(self.folder)
        return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]

    @property
    def last_checkpoint(self) -> dict:
        """What it holds, with checksums."""
        return read_manifest(sorted((self.folder / "checkpoints").glob("step-????????"))[-1])[0]


@pytest.fixture(scope="module")
def make_run(small_config, teacher_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("facilities")

    def make(method: str, setting: str, name: str) -> Run:
        world, zero_stage, loader, _ = SETTINGS[setting]
        train = {"epochs": 2, "log_every": 1, "save_every": 0.4, "zero_stage": zero_stage, "ema_decay": 0.5}
        with added_methods.added():
            config = small_config(
                folder / f"{method}-{setting}-{name}",
                teacher={"name": "cifar:resnet8", "checkpoint": str(teacher_run)},
                distiller={"name": method},
                data={"loader": loader, "workers": 1, "train_subset": 120},
                train={**train, "batch_size": 16},
            )
        return Run(config, world)

    return make


@pytest.fixture(scope="module")
def whole(make_run):
    """Runs that nothing breaks off; each is made once."""
    made = {}

    def get(method: str, setting: str) -> Run:
        if (method, setting) not in made:
            run = made[method, setting] = make_run(method, setting, "whole")
            run.end()
        return made[method, setting]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("everything", "one"),
        ("everything", "one-zero3"),
        ("everything", "two-zero3"),
        ("taught", "two"),
        ("taught", "two-zero3"),
    ],
)
def test_broken_off_in_each_phase_it_ends_as_if_unbroken(method, setting, make_run, whole):
    run, number = make_run(method, setting, "broken"), SETTINGS[setting].signal
    for moment, nth in [("measure", 5), ("fit", 4), ("train", 6)]:
        codes, output = run.attempt("at", moment, nth, int(number))
        assert set(codes) == {STOPPED if number == SIGTERM else -SIGKILL}, output
    run.end()
    expected = whole(method, setting)
    student, other = ((r.folder / "student.safetensors").read_bytes() for r in (run, expected))
    assert run.lines == expected.lines
    assert run.last_checkpoint["files"] == expected.last_checkpoint["files"]
    assert student == other


@pytest.mark.slow
def test_sharded_it_reaches_the_same_losses(whole):
    plain, sharded = (
        [line["train/loss"] for line in whole("taught", setting).lines if "train/loss" in line]
        for setting in ("two", "two-zero3")
    )
    assert len(plain) == 16
    assert sharded[0] == pytest.approx(plain[0], rel=2e-6)
    assert sharded == pytest.approx(plain, rel=1e-3)
