"""The data benchmark runs on a handful of images, and its file says what it must. No speed is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.benchmark_scripts import refusal, save_images

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "data_pipeline.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The finished process, its result and its folder. In a process of its own, since it pins itself to cores."""
    folder = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, str(SCRIPT), "--device=cpu", "--root", str(save_images(folder / "pictures"))]
    command += [f"--json={folder}/result.json", "--images=8", "--batch-size=4", "--size=16", "--cores=1"]
    command += ["--seconds=0.05", "--round-seconds=0.02"]
    process = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert process.returncode == 0, process.stderr
    return process, json.loads((folder / "result.json").read_text()), folder


def test_the_ratios_are_quotients_of_the_medians(finished):
    _, result, _ = finished
    medians = {row["loader"]: np.median(row["rounds_images_per_s"]) for row in result["rows"]}
    assert list(medians) == ["torchvision", "dali cpu", "resident"]
    for name in ("dali cpu", "resident"):
        ratio = result[f"ratio_{name.replace(' ', '_')}_over_torchvision"]
        assert ratio == pytest.approx(medians[name] / medians["torchvision"])
    assert result["ratio_dali_gpu_over_torchvision"] is None


def test_every_loader_is_measured_for_the_seconds_and_epochs_asked_for(finished):
    _, result, _ = finished
    rows = result["rows"]
    assert all(row["seconds"] >= 0.05 and row["images"] >= 5 * 8 and row["start_up_s"] > 0 for row in rows)
    assert all(row["images"] % 4 == 0 for row in rows)
    assert len({len(row["rounds_images_per_s"]) for row in rows}) == 1
    assert all(
        row["p20_images_per_s"] <= row["median_images_per_s"] <= row["p80_images_per_s"] for row in rows
    )
    spreads = [
        (row["p80_images_per_s"] - row["p20_images_per_s"]) / row["median_images_per_s"] for row in rows
    ]
    assert result["noise"] == pytest.approx(max(spreads))


def test_says_what_was_measured_without_this_machines_paths(finished):
    process, result, folder = finished
    environment, settings = result["environment"], result["settings"]
    assert environment["cores"] == 1
    assert {"torchvision", "pillow", "nvidia-dali-cuda130"} <= set(environment["versions"])
    assert "benchmarks/data_pipeline.py" in environment["command"]
    assert "--root pictures" in environment["command"]
    assert str(folder) not in json.dumps(result)
    assert (settings["images"], settings["files"]) == (8, 3)
    assert (folder / "result.png").stat().st_size > 0
    table = process.stdout.splitlines()[-3:]
    assert [line.split("  ")[0] for line in table] == ["torchvision", "dali cpu", "resident"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--root", "."], "holds no images"),
        (["--root", "nowhere"], "nowhere cannot be read"),
        (["--cores", "100000"], "--cores is 100000"),
        (["--cores", "0"], "--cores is 0"),
        (["--images", "-1"], "--images: invalid int above 0 value: '-1'"),
        (["--json", "missing/result.json"], "the folder missing does not exist"),
    ],
)
def test_ends_with_one_line_where_it_cannot_measure(tmp_path, monkeypatch, capsys, arguments, reason):
    save_images(tmp_path / "pictures")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    usual = ["--root", "pictures", "--json", "result.json", "--device", "cpu"]
    assert reason in refusal("data_pipeline.py", [*usual, *arguments], monkeypatch, capsys)
    assert not (tmp_path / "result.json").exists()
