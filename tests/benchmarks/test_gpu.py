"""All benchmarks in one command: limits, outcomes and what is left out. No GPU is needed for that."""

import json
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
import torch

from tests.benchmarks.scripts import refusal


def test_the_limits_leave_ten_minutes_unfilled():
    assert sum(gpu.LIMITS.values()) < 600


def test_what_has_no_images_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PHOTOS", str(tmp_path / "none"))
    monkeypatch.delenv("CIFAR", raising=False)
    assert list(gpu.commands(tmp_path)) == ["loss_kernel", "training_step", "scale"]
    monkeypatch.setenv("PHOTOS", str(tmp_path))
    monkeypatch.setenv("CIFAR", str(tmp_path))
    assert set(gpu.commands(tmp_path)) == set(gpu.LIMITS)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(gpu.LIMITS))
def test_every_script_knows_its_arguments(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PHOTOS", str(tmp_path))
    monkeypatch.setenv("CIFAR", str(tmp_path))
    command = [*gpu.commands(tmp_path)[name], "--help"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    for argument in filter(lambda word: word.startswith("--"), command):
        assert argument.split("=")[0] in process.stdout


def test_a_program_beyond_its_limit_ends_with_its_children(tmp_path):
    child = "import time; time.sleep(60)"
    program = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
    program += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)"
    outcome, seconds = gpu.run([sys.executable, "-c", program], 3)
    assert outcome == "not done within 3 s"
    assert seconds < 30
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    raise AssertionError("the child lives")


def test_outcomes():
    assert gpu.run([sys.executable, "-c", ""], 60)[0] == "done"
    assert gpu.run([sys.executable, "-c", "import sys; sys.exit(3)"], 60)[0] == "exit code 3"


def test_targets_are_shown_as_the_results_state_them(tmp_path):
    stated = [{"name": "a", "target": 2, "measured": 1, "met": met} for met in (True, False, None)]
    (tmp_path / "accuracy_cuda.json").write_text(json.dumps({"targets": stated}))
    assert [line.split()[-1] for line in gpu.targets(tmp_path, "accuracy")] == ["met", "missed", "measured"]
    assert gpu.targets(tmp_path, "scale") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu", *gpu.LIMITS])
def test_a_gpu_that_is_not_there_is_said_in_one_line(tmp_path, monkeypatch, capsys, script):
    monkeypatch.setenv("RESULTS", str(tmp_path))
    arguments = ["--device=cuda", f"--json={tmp_path}/result.json"] if script != "gpu" else []
    if script in ("data_pipeline", "training_step", "accuracy"):
        arguments.append(f"--root={tmp_path}")
    assert "torch finds no GPU; " in refusal(f"{script}.py", arguments, monkeypatch, capsys)
