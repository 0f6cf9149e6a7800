"""One process of a run dies or freezes: the others end in bounded time and name it."""

import signal
import time

import pytest

from kdav_fast.config import dump_config
from kdav_fast.tracking.metrics_log import read_metrics
from tests.train import processes


@pytest.fixture
def endless_run(small_config, teacher_run, tmp_path):
    """Two processes in the middle of a run that would take hours, after the checkpoint of step 16."""
    config = small_config(
        tmp_path / "run",
        teacher={"name": "cifar:resnet8", "checkpoint": str(teacher_run)},
        distiller={"name": "kdav", "memory_length": 100},
        train={
            "epochs": 10000,
            "log_every": 1,
            "evaluate_every": 0,
            "save_every": 2,
            "comm_timeout": 10.0,
            "zero_stage": 2,
        },
    )
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    group = processes.start(["-m", "kdav_fast", "distill", str(file)], world=2)
    try:
        while not (config.run_dir / "metrics.jsonl").exists() or len(read_metrics(config.run_dir)) < 20:
            assert all(process.poll() is None for process in group), processes.outputs(group)
            time.sleep(0.2)
        yield config.run_dir, group
    finally:
        for process in group:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "number"), [(0, signal.SIGSTOP), (1, signal.SIGKILL)])
def test_the_others_end_and_name_it(endless_run, lost, number):
    run_dir, group = endless_run
    group[lost].send_signal(number)
    survivor = group[1 - lost]
    text, _ = survivor.communicate(timeout=120)
    assert survivor.returncode == 1, text
    errors = [line for line in text.splitlines() if "kdav: error" in line]
    assert len(errors) == 1
    assert f"rank {lost} (host " in errors[0]
    assert f"process {group[lost].pid}) no longer answers" in errors[0]
    assert "start the same command again: it continues from the last checkpoint" in errors[0]
    assert list((run_dir / "checkpoints").glob("step-*"))
