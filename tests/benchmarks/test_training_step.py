"""The benchmark of the whole step runs on tiny networks, and its file says what it must. No speed is asserted."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.scripts import completed, refusal, save_images

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training_step.py"
TINY = [
    *("--device=cpu", "--teacher=cifar:resnet8", "--student=cifar:resnet8", "--image-size=16", "--cores=1"),
    *("--batch-size=8", "--classes=4", "--memory-length=64", "--images=6", "--round-seconds=0.02"),
    "--seconds=0.06",
]
UNCOMPILED = ["--fast", "model.compile=false", "teacher.compile=false"]
LOADED = ["reference fp32", "reference bf16 channels_last", "kdav_fast fp32", "kdav_fast"]
PHASES = ["data", "teacher", "student", "loss", "backward", "optimizer"]


def measured(folder, *arguments):
    """The finished process and its result."""
    process = completed("training_step.py", [*TINY, f"--json={folder}/result.json", *arguments])
    return process, json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Of all contenders that need no compiler: the process, its result and its folder."""
    folder = tmp_path_factory.mktemp("benchmark")
    root = save_images(folder / "pictures")
    chosen = ["--contenders", *LOADED[1:], "kdav_fast synthetic"]  # the plain reference takes part unasked
    return *measured(folder, "--root", str(root), *UNCOMPILED, *chosen), folder


def test_ratios_are_quotients_of_the_medians(finished):
    _, result, _ = finished
    rows = {row["contender"]: row for row in result["rows"]}
    assert list(rows) == [*LOADED, "kdav_fast synthetic", "student only", "teacher forward"]
    rates = {name: np.median(row["rounds_images_per_s"]) for name, row in rows.items()}
    ratios = result["ratios_kdav_fast_over"]
    for name in LOADED[:3]:
        assert ratios[name] == pytest.approx(rates["kdav_fast"] / rates[name])
    assert ratios["reference bf16 channels_last compiled"] is None
    assert result["share_of_ceiling"] == pytest.approx(rates["kdav_fast"] / rates["kdav_fast synthetic"])
    steps = {name: row["median_step_s"] for name, row in rows.items()}
    parts = steps["student only"] + steps["teacher forward"]
    assert result["distillation_overhead"] == pytest.approx(steps["kdav_fast synthetic"] / parts)
    share = result["breakdown_s"]["kdav_fast"]["loss"] / steps["kdav_fast"]
    assert result["loss_share"] == pytest.approx(share)


def test_all_take_the_same_first_step(finished):
    _, result, _ = finished
    first = {row["contender"]: row for row in result["first_step"]}
    assert list(first) == LOADED
    plain = first["reference fp32"]["first_loss"]
    for name, row in first.items():
        difference = abs(row["first_loss"] - plain) / plain
        assert row["allowed"] == (1e-4 if name.endswith("fp32") else 2e-2)
        assert row["relative_difference"] == pytest.approx(difference)
        assert difference <= row["allowed"]


def test_the_phases_make_up_the_step(finished):
    _, result, _ = finished
    steps = {row["contender"]: row["median_step_s"] for row in result["rows"]}
    assert list(result["breakdown_s"]) == ["kdav_fast fp32", "kdav_fast", "kdav_fast synthetic"]
    for name, phases in result["breakdown_s"].items():
        assert list(phases) == [*PHASES, "other", "communication"]
        assert phases.pop("communication") is None
        assert min(phases.values()) >= 0
        # Medians of parts do not quite add up to the median of the whole.
        assert sum(phases.values()) == pytest.approx(steps[name], rel=0.5)


def test_says_what_was_measured_without_this_machines_paths(finished):
    process, result, folder = finished
    environment, settings = result["environment"], result["settings"]
    assert environment["cores"] == 1
    assert {"torch", "torchvision", "timm", "deepspeed", "nvidia-dali-cuda130", "triton"} <= set(
        environment["versions"]
    )
    assert (settings["source"], settings["files"], settings["batch_size"]) == ("pictures", 3, 8)
    assert settings["fast"] == {
        "train.precision": "bf16",
        "model.compile": "false",
        "teacher.compile": "false",
    }
    assert str(folder) not in json.dumps(result)
    assert (folder / "result.png").read_bytes().startswith(b"\x89PNG")
    table = [line.split("  ")[0] for line in process.stdout.splitlines()]
    assert table[-7:] == [row["contender"] for row in result["rows"]]
    assert {path.name for path in folder.iterdir()} == {"pictures", "result.json", "result.png"}


@pytest.mark.slow
def test_compiled_contenders_on_made_photographs(tmp_path):
    names = ["reference bf16 channels_last compiled", "kdav_fast"]
    _, result = measured(tmp_path, "--contenders", *names)
    rows = {row["contender"]: row for row in result["rows"]}
    assert list(rows) == ["reference fp32", *names]
    assert all(rows[name]["compiled_graphs"] > 0 for name in names)
    assert result["settings"]["source"].startswith("made")
    assert 50 < result["settings"]["mean_file_kib"] < 200
    assert result["share_of_ceiling"] is result["distillation_overhead"] is None
    assert [target["met"] for target in result["targets"]][1::2] == [None, None]


def run_here(monkeypatch, *arguments):
    """The script in this process, up to where it fails; its names."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    return runpy.run_path(str(SCRIPT), run_name="__main__" if arguments else "training_step")


def test_other_training_is_refused(monkeypatch):
    check = run_here(monkeypatch)["check"]
    losses = {"reference fp32": 2.0, "kdav_fast": 2.03}
    assert check(losses, {"reference fp32"})[1]["relative_difference"] == pytest.approx(0.015)
    with pytest.raises(
        AssertionError, match="kdav_fast has loss 2.030000 .* allowed 1e-04; they do not train"
    ):
        check(losses, {"reference fp32", "kdav_fast"})
    with pytest.raises(AssertionError, match="kdav_fast has loss nan"):
        check(losses | {"kdav_fast": float("nan")}, set())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--root", "."], "holds no images"),
        (["--root", "nowhere"], "nowhere cannot be read"),
        (["--cores", "100000"], "--cores is 100000"),
        (["--batch-size", "0"], "--batch-size: invalid int above 0 value: '0'"),
        (["--contenders", "fastest"], "--contenders has 'fastest'; allowed: 'reference fp32', "),
        (["--fast", "model.compile"], "--fast has 'model.compile'; give KEY=VALUE"),
        (["--fast", "model.speed=1"], "unknown key 'model.speed'"),
        (["--teacher", "cifar:none"], "cifar:none"),
        (["--json", "missing/result.json"], "the folder missing does not exist"),
        (["--plot", "missing/result.png"], "the folder missing does not exist"),
    ],
)
def test_ends_with_one_line_where_it_cannot_measure(tmp_path, monkeypatch, capsys, arguments, reason):
    save_images(tmp_path / "pictures")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    usual = [*TINY, "--root", "pictures", "--json", "result.json"]
    assert reason in refusal("training_step.py", [*usual, *arguments], monkeypatch, capsys)
    assert not (tmp_path / "result.json").exists()


def test_refuses_to_be_one_of_several_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, *TINY, "--json", "result.json")
    assert ended.value.code == 2
    assert "WORLD_SIZE is 2; this benchmark is one process" in capsys.readouterr().err
