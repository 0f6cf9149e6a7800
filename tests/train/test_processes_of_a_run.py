"""The processes of a run: they start alike or not at all, and one that is lost at any moment is named in time."""

import signal
import subprocess
import sys

import pytest

from kdav_fast.config import dump_config
from tests.train import processes
from tests.train.freeze_at import MOMENTS

pytestmark = pytest.mark.slow
WATCHDOG = 90
"""Seconds; `comm_timeout` is 5. No test measures time, but torch and the control group would wait for many minutes."""


@pytest.fixture
def write(small_config, teacher_run, tmp_path):
    """Writes a config of a short distillation; `write(name, **changes of train)` gives its path."""

    def written(name: str, **train) -> str:
        config = small_config(
            tmp_path / "run",
            teacher={"name": "cifar:resnet8", "checkpoint": str(teacher_run)},
            distiller={"name": "kdav", "memory_length": 100},
            train={"epochs": 1, "comm_timeout": 5.0, **train},
        )
        file = tmp_path / f"{name}.yaml"
        file.write_text(dump_config(config))
        return str(file)

    return written


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if "kdav: error" in line]


def start(*programs: list[str] | None, **environment: str) -> list:
    """One program a rank; None for one that never comes."""
    world = len(programs)
    everywhere = processes._environments(world, environment)
    return [
        program and processes.Fork(program, each, merge=True)
        for program, each in zip(programs, everywhere, strict=True)
    ]


def distill(config: str, *overrides: str) -> list[str]:
    return ["-m", "kdav_fast", "distill", config, *overrides]


def refused(*group) -> str:
    """The line of a group that does not begin: one, and exit code 2 everywhere."""
    texts = processes.outputs(group, WATCHDOG)
    assert [process.returncode for process in group] == [2] * len(group), texts
    lines = [line for text in texts for line in errors(text)]
    assert len(lines) == 1, texts
    assert "Traceback" not in "".join(texts)
    return lines[0]


def test_another_learning_rate_on_one_process_is_refused(write, tmp_path):
    config = write("config")
    line = refused(*start(distill(config), distill(config, "optimizer.lr=0.5")))
    assert "optimizer.lr is 0.1 on rank 0 (host" in line
    assert "and 0.5 on rank 1 (host" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_process_without_a_config_is_named_to_the_others(write, faulty):
    programs = [distill(write("config")), distill(write("config"))]
    programs[faulty][3] = "nowhere.yaml"
    assert "config nowhere.yaml: No such file" in refused(*start(*programs))


def test_bad_input_of_all_is_one_line(write):
    config = write("config", batch_size=33)
    assert "train.batch_size is 33" in refused(*start(distill(config), distill(config)))


def test_the_same_launch_again_is_refused_and_the_first_goes_on(write, tmp_path):
    config = write("config", epochs=10000)
    first = start(distill(config), distill(config))
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert all(process.poll() is None for process in first)
        again = start(distill(config), distill(config))
        assert f"is in use by process {first[0].pid} on host" in refused(*again)
        assert all(process.poll() is None for process in first)
    finally:
        for process in first:
            process.kill()


@pytest.mark.parametrize("missing", [0, 1])
def test_who_does_not_come_is_named(write, missing):
    programs = [distill(write("config"))] * 2
    programs[missing] = None
    process = start(*programs)[1 - missing]
    (text,) = processes.outputs([process], WATCHDOG)
    assert process.returncode == 1, text
    (line,) = errors(text)
    assert f"rank {missing} " in line
    assert "within 5 s" in line


@pytest.mark.parametrize(("number", "lost"), [(signal.SIGSTOP, 0), (signal.SIGKILL, 1)])
@pytest.mark.parametrize("moment", MOMENTS)
def test_who_is_lost_at_any_moment_is_named(write, moment, number, lost):
    program = [str(processes.REPOSITORY / "tests/train/freeze_at.py"), write("config")]
    group = start(*[[*program, str(lost), moment, str(int(number))]] * 2)
    try:
        try:
            text, _ = group[1 - lost].communicate(WATCHDOG)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it still runs after {group[1 - lost].output_so_far()}")
    finally:
        for process in group:
            process.kill()
    assert group[1 - lost].returncode == 1, text
    (line,) = errors(text)
    assert f"rank {lost} (host" in line
    assert "no longer answers" in line
    assert "frame #" not in text
    assert "Traceback" not in text


def test_the_first_line_on_stderr_is_ours(write):
    """torch's warnings and stacks are not before it, in a process that imports torch itself."""
    # Importing takes long on a busy machine.
    config = write("config", comm_timeout=60.0)
    program = [sys.executable, str(processes.REPOSITORY / "tests/train/freeze_at.py"), config]
    group = [
        subprocess.Popen(
            [*program, "0", "evaluating", str(int(signal.SIGKILL))],
            env={key: value for key, value in each.items() if key != "TORCH_CPP_LOG_LEVEL"},
            cwd=processes.REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in processes._environments(2, {})
    ]
    try:
        _, text = group[1].communicate(timeout=240)
    finally:
        for process in group:
            process.kill()
    assert text.splitlines()[0].startswith("kdav: error: rank 0 (host"), text
