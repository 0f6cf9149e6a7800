"""All benchmarks in one command: limits, outcomes and what is left out. No GPU is needed for that."""

import json
import re
import sys
import time
from pathlib import Path

import gpu
import gpu_stages
import pytest
import record
import torch

from tests.benchmarks.scripts import refusal


@pytest.fixture
def options(tmp_path):
    """As read from the command line, with folders that exist."""
    given = [f"--{name}={tmp_path}" for name in ("photos", "cifar", "teacher", "results")]
    return gpu.make_parser().parse_args(given)


def test_each_part_fits_into_nine_minutes():
    assert all(part.limit <= 540 for part in gpu.PARTS.values())


def test_what_has_no_images_or_packages_is_said(options, monkeypatch):
    assert [name for name in gpu.PARTS if gpu_stages.why_not(name, options)] == []
    options.photos = options.cifar = None
    told = {name: reason for name in gpu.PARTS if (reason := gpu_stages.why_not(name, options))}
    assert told == {
        "data_pipeline": "no images: give --photos FOLDER",
        "accuracy": "no images: give --cifar FOLDER",
    }
    monkeypatch.setattr(gpu_stages, "version", lambda package: None if package == "deepspeed" else "1")
    assert gpu_stages.why_not("scale", options) == "deepspeed not installed"
    assert gpu_stages.why_not("method_costs", options) == "deepspeed not installed"
    assert gpu_stages.why_not("loss_kernel", options) is None


@pytest.mark.parametrize("preset", ["full", "tiny"])
@pytest.mark.parametrize("name", list(gpu.PARTS))
def test_every_script_knows_its_arguments(options, name, preset):
    options.preset = preset
    _, script, *arguments = gpu.command(name, options)
    text = Path(script).read_text() + Path(script).with_name("scale.py").read_text()
    known = re.findall(r"add(?:_argument)?\(\s*f?\"(--[a-z-]+)", text)
    generated = {"--teacher", "--student", "--classes", "--image-size", "--batch-size", "--memory-length"}
    generated |= {"--epochs", "--seeds", "--variant-seeds", "--train-subset", "--minutes", "--lr"}
    for argument in filter(lambda word: word.startswith("--"), arguments):
        assert argument.split("=")[0] in {*known, *generated}


def test_no_part_is_begun_when_the_time_is_over(options, capsys):
    options.minutes, options.parts = 1e-6, ["check"]
    assert gpu.run_all(options) == {
        "check": ("not measured: the 1e-06 minutes are over: the same command goes on", 0.0)
    }


def test_a_program_beyond_its_limit_ends_with_its_children(tmp_path):
    child = "import time; time.sleep(60)"
    program = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
    program += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)"
    outcome, seconds = gpu.run([sys.executable, "-c", program], 3)
    assert outcome == "not done within 3 s: the same command goes on"
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


def test_a_program_that_asks_to_be_started_again_is(tmp_path):
    program = (
        f"import sys, pathlib; p = pathlib.Path({str(tmp_path / 'once')!r}); again = p.exists(); p.touch(); "
    )
    program += f"sys.exit(0 if again else {record.GO_ON})"
    assert gpu.run([sys.executable, "-c", program], 60)[0] == "done"


def test_what_could_not_be_measured_is_listed(options):
    rows = [
        {"shape": "A", "pass": "full", "implementation": "compile", "error": "no compiler"},
        {"what": "bits", "right": False},
        {"what": "errors", "right": True},
    ]
    first = [{"contender": name, "relative_difference": 0.5, "equal": name == "a"} for name in "ab"]
    result = {"rows": rows, "not_measured": {"dali gpu": "not installed"}, "first_step": first}
    (options.results / "check_cuda.json").write_text(json.dumps(result))
    assert gpu.left_out("check", options) == [
        "dali gpu: not installed",
        "b: its first loss is not the reference's (5.0e-01)",
        "A full compile: no compiler",
        "bits: wrong",
    ]
    assert gpu.left_out("scale", options) == []


def test_the_closing_table_has_every_figure_of_the_design(options, capsys):
    gpu.print_tables({"scale": ("not measured: no network", 0.0)}, options)
    parts, table = capsys.readouterr().out.split("wanted")
    assert "not measured: no network" in parts
    wanted = ["shape A, ids", "shape A, dense", "large shape, ids", "large shape, dense", "peak extra memory"]
    wanted += ["roofline", "torch.compile", "bf16 error", "same bits", "on a CPU", "on the CPU", "on the GPU"]
    wanted += ["plain PyTorch reference", "resident data", "share of the step", "student step + teacher"]
    wanted += ["cached teacher", "without waiting", "files read", "KDAV over KD", "KDAV over SimKD"]
    wanted += ["every method", "restart"]
    for what in wanted:
        assert what in table
    lines = table.splitlines()[1:]
    assert all("not measured" in line or line.endswith("tested") for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu", *gpu.PARTS])
def test_a_gpu_that_is_not_there_is_said_in_one_line(tmp_path, monkeypatch, capsys, script):
    monkeypatch.setenv("RESULTS", str(tmp_path))
    arguments = ["--device=cuda", f"--json={tmp_path}/result.json"] if script != "gpu" else []
    if script in ("data_pipeline", "training_step", "accuracy"):
        arguments.append(f"--root={tmp_path}")
    assert "torch finds no GPU; " in refusal(f"{script}.py", arguments, monkeypatch, capsys)
