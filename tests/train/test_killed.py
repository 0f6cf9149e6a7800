"""A run that is killed or stopped anywhere and started again ends as if nothing had happened: with the same bytes."""

import json
import os
import random
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from kdav_fast.checkpoint.manifest import read_manifest
from kdav_fast.config import dump_config
from kdav_fast.runtime.stopping import STOPPED
from kdav_fast.tracking.metrics_log import read_metrics
from tests.train import processes
from tests.train.killed_run import Strike

OPTIONS = {
    "data": {"on_reshard": "restart_epoch"},
    "distiller": {"name": "kdav", "memory_length": 192, "posterior": "dense"},
    "train": {
        "accumulate": 2,
        "mixup": 0.4,
        "ema_decay": 0.9,
        "clip_grad_norm": 0.5,
        "log_every": 2,
        "save_every": 0.4,
    },
}
"""Everything that carries state. 22 steps of two micro-batches, 15 micro-batches an epoch: the first epoch ends inside
step 8 and the second with step 15. Saves after each third step; the one of step 3 finds the memory half full."""
TIMES = {"images_per_second", "data_wait_share"}


class Attempt(NamedTuple):
    codes: list[int]
    """Of each rank."""
    output: str
    """Of all ranks."""

    @property
    def continued(self) -> int:
        """The step after which this attempt continued; 0 if it took all of them."""
        found = re.search(r"continuing .* after step (\d+)", self.output)
        return int(found[1]) if found else 0

    @property
    def continued_before(self) -> int:
        """The batch of the measuring pass after which this attempt continued; 0 if it began it or had it behind it."""
        found = re.search(
            r"continuing .* before its first step: the teacher's embeddings, after batch (\d+)", self.output
        )
        return int(found[1]) if found else 0

    @property
    def moments(self) -> int:
        """How many moments there were on the rank that had fewest."""
        return min(map(int, re.findall(r"passed (\d+) moments", self.output)))


class Run:
    """A run on some number of processes, and the attempts at it."""

    def __init__(self, launcher: subprocess.Popen, config: Any, world: int) -> None:
        self._launcher, self._world, self.folder = launcher, world, config.run_dir
        self.config = config.run_dir.with_suffix(".yaml")
        self.config.write_text(dump_config(config))
        self.command = ["-m", "kdav_fast", "distill", str(self.config)]
        self.attempts: list[Attempt] = []

    def attempt(self, strike: Strike | None = None, world: int | None = None) -> Attempt:
        request = {"config": str(self.config), "world": world or self._world, "strike": strike}
        print(json.dumps(request), file=self._launcher.stdin, flush=True)
        made = Attempt(**json.loads(self._launcher.stdout.readline()))
        self.attempts.append(made)
        return made

    def killed(self, strike: Strike) -> Attempt:
        """An attempt that dies by its strike."""
        made = self.attempt(strike)
        assert made.codes[strike.rank] == -SIGKILL, f"{strike}\n{made.output}"
        return made

    def ended(self) -> Attempt:
        """An attempt that comes to the run's end."""
        made = self.attempt()
        assert made.codes == [0] * self._world, made.output
        return made

    def ended_by_command(self) -> None:
        """The same, by processes that import for themselves."""
        texts = processes.run(self.command, self._world)
        self.attempts.append(Attempt([0] * self._world, "".join(texts)))

    def written(self) -> int | None:
        """When an attempt last wrote the config, which it does before it trains."""
        file = self.folder / "config.yaml"
        return file.stat().st_mtime_ns if file.exists() else None

    @property
    def student_file(self) -> Path:
        return self.folder / "student.safetensors"

    @property
    def student(self) -> bytes:
        return self.student_file.read_bytes()

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-????????"))


@pytest.fixture(scope="module")
def make_run(small_config, teacher_run, tmp_path_factory):
    """Makes the run of some number of processes and some options, each in a folder of its own."""
    launcher = subprocess.Popen(
        [sys.executable, str(processes.REPOSITORY / "tests/train/killed_run.py")],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": str(processes.REPOSITORY),
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    teacher = {"name": "cifar:resnet8", "checkpoint": str(teacher_run)}

    def make(world: int, **train: Any) -> Run:
        folder = tmp_path_factory.mktemp("killed") / "run"
        changes = {**OPTIONS, "teacher": teacher, "train": {**OPTIONS["train"], **train}}
        return Run(launcher, small_config(folder, **changes), world)

    yield make
    launcher.stdin.close()
    launcher.wait()


@pytest.fixture(scope="module")
def whole(make_run):
    """The same run, never stopped; made once."""
    made = {}

    def get(world: int, zero_stage: int = 0) -> Run:
        if (world, zero_stage) not in made:
            run = made[world, zero_stage] = make_run(world, zero_stage=zero_stage)
            run.ended()
        return made[world, zero_stage]

    return get


def check_equal(run: Run, whole: Run) -> None:
    """Student, log and the state in the last checkpoint are as if the run had never been stopped."""
    assert run.student == whole.student
    lines, expected = ([(_key(line), line) for line in read_metrics(r.folder)] for r in (run, whole))
    assert [key for key, _ in lines] == [key for key, _ in expected]
    restarts = {attempt.continued for attempt in run.attempts}
    for ((step, _), line), (_, other) in zip(lines, expected, strict=True):
        # Of an interval in which an attempt began, its losses are those of the steps after that.
        partial = any(start in restarts for start in range(step - OPTIONS["train"]["log_every"] + 1, step))
        compared = [key for key in other if not (key in TIMES or (partial and key.startswith("train/")))]
        assert {key: line[key] for key in compared} == {key: other[key] for key in compared}
    last, other = (read_manifest(r.checkpoints[-1])[0] for r in (run, whole))
    assert (last["step"], last["files"]) == (other["step"], other["files"])  # with their checksums
    assert (run.folder / "report" / "index.html").is_file()


def _key(line: dict[str, Any]) -> tuple[int, bool]:
    return line["step"], "val/top1" in line


@pytest.mark.slow
def test_killed_in_every_stage(make_run, whole):
    """The checkpoint from which the next attempt continues tells that the kill hit the stage."""
    run = make_run(1)
    before, measured = 0, [0, 6, 12, 12, 0]
    for moment, nth, continued in [
        ("observe", 8, 0),  # in the measuring pass, saved after 6 of its 15 batches
        ("observe", 8, 0),  # after 12
        ("fsync pieces-00000.safetensors", 1, 0),  # a rank's file, half written
        ("rename step-00000000.tmp", 1, 0),  # the one of the pass was just removed
        ("fsync manifest.json", 4, 0),
        ("backward", 8, 3),  # between the micro-batches of step 4
        ("rename step-00000006.tmp", 1, 3),
        ("replace latest.tmp", 1, 6),
        ("rmtree step-", 1, 9),
        ("log", 3, 12),  # half a line
        ("backward", 7, 15),  # the first of an epoch
        ("evaluate_student", 1, 21),
        ("fsync student.safetensors.tmp", 1, 21),
        ("replace student.safetensors.tmp", 1, 21),
        ("write_report", 1, 0),  # the student is there: the run is complete, but for the report
        ("write_report", 1, 0),
        ("replace index.html.tmp", 1, 0),
    ]:
        killed = run.killed(Strike(0, moment, nth))
        assert killed.continued == before
        assert killed.continued_before == (measured.pop(0) if measured else 0)
        before = continued
        if continued == 3:
            memory = load_file(run.checkpoints[-1] / "distiller.safetensors")
            assert memory["memory.filled"] == 96
    assert run.ended().continued == before
    check_equal(run, whole(1))
    assert [path.name for path in run.checkpoints] == [path.name for path in whole(1).checkpoints]
    assert not list(run.folder.rglob("*.tmp"))


@pytest.mark.slow
def test_a_signal_and_a_kill_in_the_measuring_pass_of_two(make_run, whole):
    run = make_run(2)
    stopped = run.attempt(Strike(1, "observe", 5, SIGTERM))
    assert stopped.codes == [STOPPED, STOPPED], stopped.output
    assert "stopped before the first step, state saved; the same command continues" in stopped.output
    assert not run.student_file.exists()
    stopped_at = run.killed(Strike(0, "observe", 8)).continued_before
    assert stopped_at == 6  # they agree one batch later
    assert run.ended().continued_before == 12
    check_equal(run, whole(2))


@pytest.mark.slow
def test_another_number_of_processes_begins_the_measuring_pass_anew(make_run, whole):
    run = make_run(2)
    assert run.attempt(Strike(0, "observe", 5, SIGTERM)).codes == [STOPPED, STOPPED]
    alone = run.attempt(world=1)
    assert alone.codes == [0], alone.output
    assert (
        "was written by 2 processes in the middle of what comes before distillation; 1 begin that anew"
        in alone.output
    )
    check_equal(run, whole(1))


@pytest.mark.slow
def test_the_bytes_depend_on_the_seed(make_run, whole):
    """Else their equality would say nothing."""
    other = make_run(1, seed=1)
    other.ended()
    assert other.student != whole(1).student


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize(
    ("world", "kills", "train"),
    [
        (1, 10, {"async_checkpoints": True}),
        (2, 5, {}),
        (2, 3, {"zero_stage": 2}),
        (2, 3, {"zero_stage": 3, "async_checkpoints": True}),
    ],
    ids=["one", "two", "two-zero2", "two-zero3"],
)
def test_killed_at_random_moments(make_run, whole, world, kills, train, seed):
    undisturbed, run = whole(world, train.get("zero_stage", 0)), make_run(world, **train)
    draw = random.Random(seed)
    # No attempt continues after the moment at which the one before it died, so that together they reach every cut.
    cuts = sorted(draw.sample(range(1, undisturbed.attempts[0].moments), kills))
    for last, cut in pairwise([0, *cuts]):
        run.killed(Strike(draw.randrange(world), "", cut - last))
    run.ended()
    check_equal(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [SIGTERM, SIGUSR1, SIGINT])
def test_a_signal_to_one_of_two_stops_both_at_the_same_step(make_run, whole, number):
    draw = random.Random(number)
    run, rank, micro_batch = make_run(2), draw.randrange(2), draw.randint(1, 36)
    stopped = run.attempt(Strike(rank, "backward", micro_batch, number))
    assert stopped.codes == [STOPPED, STOPPED], stopped.output
    step = int(re.search(r"stopped at step (\d+)/22, state saved", stopped.output)[1])
    assert step - 1 <= (micro_batch + 1) // 2 <= step
    assert run.checkpoints[-1].name == f"step-{step:08d}"
    for rank in range(2):
        state = json.loads((run.checkpoints[-1] / f"rank-{rank:05d}.json").read_text())
        assert state["loader"]["epoch"] * 15 + state["loader"]["step"] == 2 * step
    run.ended_by_command()
    check_equal(run, whole(2))


@pytest.mark.slow
def test_killed_from_outside_at_random_times(make_run, whole):
    draw = random.Random(0)
    run = make_run(1, async_checkpoints=True)
    for _ in range(3):
        before = run.written()
        [process] = processes.start(run.command, 1)
        while run.written() == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1))
        process.kill()
        output, _ = process.communicate()
        run.attempts.append(Attempt([process.returncode], output))
    run.ended_by_command()
    check_equal(run, whole(1))
