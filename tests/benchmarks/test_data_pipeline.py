"""The data benchmark runs on a handful of images, and its file says what it must. No speed is asserted."""

import json

import numpy as np
import pytest

from tests.benchmarks.scripts import completed, refusal, save_images


def test_the_ratios_are_quotients_of_the_medians(tmp_path):
    arguments = ["--device=cpu", "--root", str(save_images(tmp_path / "pictures")), "--images=8", "--size=16"]
    arguments += [f"--json={tmp_path}/result.json", "--batch-size=4", "--cores=1"]
    completed("data_pipeline.py", [*arguments, "--seconds=0.05", "--round-seconds=0.02"])
    result = json.loads((tmp_path / "result.json").read_text())
    medians = {row["loader"]: np.median(row["rounds_images_per_s"]) for row in result["rows"]}
    assert list(medians) == ["torchvision", "dali cpu", "resident"]
    for name in ("dali cpu", "resident"):
        ratio = result[f"ratio_{name.replace(' ', '_')}_over_torchvision"]
        assert ratio == pytest.approx(medians[name] / medians["torchvision"])
    assert result["ratio_dali_gpu_over_torchvision"] is None
    assert (result["settings"]["images"], result["settings"]["files"]) == (8, 3)
    assert result["environment"]["cores"] == 1
    assert str(tmp_path) not in json.dumps(result)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--root", "empty"], "empty has no class folders"),
        (["--root", "nowhere"], "nowhere cannot be read"),
        (["--cores", "100000"], "--cores is 100000"),
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
