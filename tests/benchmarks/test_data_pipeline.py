"""The data benchmark runs on a handful of images, and its file says what it must. No speed is asserted."""

import json

import numpy as np
import pytest

from tests.benchmarks.scripts import completed, refusal, save_images


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The finished process, its result and its folder."""
    folder = tmp_path_factory.mktemp("benchmark")
    arguments = ["--device=cpu", "--root", str(save_images(folder / "pictures")), "--images=8", "--size=16"]
    arguments += [f"--json={folder}/result.json", "--batch-size=4", "--cores=1"]
    process = completed("data_pipeline.py", [*arguments, "--seconds=0.05", "--round-seconds=0.02"])
    return process, json.loads((folder / "result.json").read_text()), folder


def test_the_ratios_are_quotients_of_the_medians(finished):
    _, result, _ = finished
    medians = {row["loader"]: np.median(row["rounds_images_per_s"]) for row in result["rows"]}
    assert list(medians) == ["torchvision", "dali cpu", "resident"]
    for name in ("dali cpu", "resident"):
        ratio = result[f"ratio_{name.replace(' ', '_')}_over_torchvision"]
        assert ratio == pytest.approx(medians[name] / medians["torchvision"])
    assert result["ratio_dali_gpu_over_torchvision"] is None


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
