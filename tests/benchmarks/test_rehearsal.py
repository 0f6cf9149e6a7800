"""All of benchmarks/gpu.py on a CPU with tiny presets: killed in each part, gone on with, and without its packages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_stages
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from kdav_fast.models import build_classifier
from tests.benchmarks.scripts import BENCHMARKS, save_images

MEASURED = {
    "training_step": "measured",
    "method_costs": "measured",
    "data_pipeline": "rounds",
    "scale": "pieces",
    "reading": "rounds",
}
"""Name of the list that a part measures, where it is not "rows"."""
# Kills the process where it would replace a result that holds something already: between two rows, with the new file
# written beside the old one.
KILLER = """
import json, os, signal, sys

def kill(event, arguments):
    if event != "os.rename" or not str(arguments[1]).endswith("_cpu.json") or not os.path.exists(arguments[1]):
        return
    with open(arguments[1]) as file:
        result = json.load(file)
    if any(result.get(name) for name in ("rows", "measured", "rounds", "pieces")):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
"""
# As if these packages were not installed.
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """What gpu.py is given: photographs and small images of noise, and a teacher that nobody has trained."""
    folder = tmp_path_factory.mktemp("rehearsal")
    noise = np.random.default_rng(0)
    for split, count in (("train", 70), ("test", 4)):
        for name in ("cat", "dog"):
            (folder / "cifar" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "cifar" / split / name / f"{number}.png")
    weights = build_classifier("cifar:resnet8", 2, width=0.25).stock_state_dict()
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "teacher.safetensors")
    photos = save_images(folder / "photos")
    given = {"photos": photos, "cifar": folder / "cifar", "teacher": folder / "teacher.safetensors"}
    return [*(f"--{name}={place}" for name, place in given.items()), f"--results={folder / 'results'}"]


def run(options, tmp_path_factory, *parts, site="", expected=0):
    """What gpu.py prints, with `site` run first in it and in all that it starts."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(site)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONPATH": str(folder)}
    environment.pop("TRITON_INTERPRET", None)  # as on a machine for measuring
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *parts, "--device=cpu", "--preset=tiny", *options]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1000)
    assert process.returncode == expected, process.stdout[-5000:] + process.stderr[-5000:]
    return process.stdout


def result_of(part, options):
    folder = Path(options[-1].removeprefix("--results="))
    return json.loads((folder / f"{part}_cpu.json").read_text())


def outcomes(printed):
    """Of each part, from the last table but one."""
    table = printed.split("seconds  outcome\n")[1].split("\n\n")[0]
    lines = [line.split(maxsplit=2) for line in table.splitlines() if not line.startswith(" ")]
    return {name: outcome for name, _, outcome in lines}


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu_stages.PARTS)
def test_a_killed_part_goes_on_with_what_it_has_and_measures_nothing_again(options, tmp_path_factory, part):
    killed = run(options, tmp_path_factory, part, site=KILLER, expected=1)
    assert outcomes(killed) == {part: "exit code -9"}
    before = result_of(part, options)
    finished = run(options, tmp_path_factory, part)
    assert outcomes(finished) == {part: "done"}
    after = result_of(part, options)
    old, new = (result[MEASURED.get(part, "rows")] for result in (before, after))
    assert 0 < len(old) < len(new)
    assert new[: len(old)] == old
    said = [json.dumps(row) for row in new]
    assert len(set(said)) == len(said)
    if part == "training_step":
        first = {row["contender"]: row for row in after["first_step"]}
        assert len(first) == 4
        assert all(row["equal"] for row in first.values())  # of both attempts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("absent", "parts", "lost"),
    [
        (("nvidia.dali",), ("training_step", "data_pipeline"), {"kdav_fast", "dali cpu", "resident"}),
        (("deepspeed",), ("training_step", "scale"), {"kdav_fast", "kdav_fast synthetic", "student only"}),
        (("pydantic", "matplotlib", "psutil"), ("check", "loss_kernel", "training_step", "accuracy"), set()),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_a_package_that_is_not_there_costs_only_its_own(options, tmp_path_factory, absent, parts, lost):
    results = tmp_path_factory.mktemp("without")
    given = [*options[:-1], f"--results={results}"]
    whole = (
        {"scale"}
        if "deepspeed" in absent
        else {"training_step", "accuracy"}
        if "pydantic" in absent
        else set()
    )
    printed = run(
        given, tmp_path_factory, *parts, site=BLOCKER.format(absent=absent), expected=1 if whole else 0
    )
    found = outcomes(printed)
    for part in parts:
        if part in whole:
            assert found[part] == f"not measured: {absent[0]} not installed"
            continue
        assert found[part] == "done"
        result = result_of(part, given)
        assert result["rows"]
        assert not any("error" in row for row in result["rows"])
    told = {name for part in set(parts) - whole for name in result_of(part, given).get("not_measured", ())}
    assert told == lost
    assert all(f"{name}: " in printed for name in lost)
