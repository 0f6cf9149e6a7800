"""The benchmark of the whole step runs on tiny networks, and its file says what it must. No speed is asserted."""

import json
import math

import numpy as np
import pytest
import step_beside
import step_results
import training_step

from kdav_fast.errors import InputError
from tests.benchmarks.scripts import BENCHMARKS, completed, refusal, save_images

TINY = [
    *("--device=cpu", "--teacher=cifar:resnet8", "--student=cifar:resnet8", "--image-size=16", "--cores=1"),
    *("--batch-size=8", "--classes=4", "--memory-length=64", "--images=6", "--round-seconds=0.02"),
    "--seconds=0.06",
]
UNCOMPILED = ["--fast", "model.compile=false", "teacher.compile=false"]
LOADED = ["reference fp32", "reference bf16 channels_last", "kdav_fast fp32", "kdav_fast"]
RESIDENT = ["kdav_fast synthetic", "kdav_fast synthetic, plain module"]
RESIDENT += ["kdav_fast synthetic, DistributedDataParallel"]
PARTS = ["data", "teacher", "student", "loss", "backward", "optimizer"]


def measured(folder, *arguments):
    """The result."""
    completed("training_step.py", [*TINY, f"--json={folder}/result.json", *arguments])
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Of all contenders that need no compiler: the result and its folder."""
    folder = tmp_path_factory.mktemp("benchmark")
    root = save_images(folder / "pictures")
    chosen = ["--contenders", *LOADED[1:], *RESIDENT]  # the plain reference takes part unasked
    return measured(folder, "--root", str(root), *UNCOMPILED, *chosen), folder


def test_ratios_are_quotients_of_the_medians(finished):
    result, _ = finished
    rows = {row["contender"]: row for row in result["rows"]}
    assert list(rows) == [*LOADED, *RESIDENT, "student only", "teacher forward"]
    assert result["not_measured"] == {}
    rates = {name: np.median(row["rounds_images_per_s"]) for name, row in rows.items()}
    ratios = result["ratios_kdav_fast_over"]
    for name in LOADED[:3]:
        assert ratios[name] == pytest.approx(rates["kdav_fast"] / rates[name])
    assert ratios["reference bf16 channels_last compiled"] is None
    assert result["share_of_ceiling"] == pytest.approx(rates["kdav_fast"] / rates["kdav_fast synthetic"])
    steps = {name: row["median_step_s"] for name, row in rows.items()}
    without = steps["student only"] + steps["teacher forward"]
    assert result["distillation_overhead"] == pytest.approx(steps["kdav_fast synthetic"] / without)
    share = result["breakdown_s"]["kdav_fast"]["loss"] / steps["kdav_fast"]
    assert result["loss_share"] == pytest.approx(share)


def test_all_take_the_same_first_step(finished):
    result, _ = finished
    first = {row["contender"]: row for row in result["first_step"]}
    assert list(first) == LOADED + RESIDENT
    plain = first["reference fp32"]["first_loss"]
    for name, row in first.items():
        assert row["allowed"] == (1e-4 if name.endswith("fp32") else 2e-2)
        assert abs(row["first_loss"] - plain) <= row["allowed"] * plain
        assert row["equal"]


def test_the_parts_make_up_the_step(finished):
    result, _ = finished
    steps = {row["contender"]: row["median_step_s"] for row in result["rows"]}
    assert list(result["breakdown_s"]) == ["kdav_fast fp32", "kdav_fast", "kdav_fast synthetic"]
    for name, parts in result["breakdown_s"].items():
        assert list(parts) == [*PARTS, "other", "communication"]
        assert parts.pop("communication") is None
        assert min(parts.values()) >= 0
        # Medians of parts do not quite add up to the median of the whole.
        assert sum(parts.values()) == pytest.approx(steps[name], rel=0.5)


def test_says_what_was_measured_without_this_machines_paths(finished):
    result, folder = finished
    settings = result["settings"]
    assert (settings["source"], settings["files"], settings["batch_size"]) == ("pictures", 3, 8)
    fast = dict(setting.split("=") for setting in UNCOMPILED[1:])
    assert settings["fast"] == {"train.precision": "bf16", **fast}
    assert str(folder) not in json.dumps(result)


@pytest.mark.slow
def test_compiled_contenders_on_made_photographs(tmp_path):
    names = ["reference bf16 channels_last compiled", "kdav_fast"]
    result = measured(tmp_path, "--contenders", *names)
    rows = {row["contender"]: row for row in result["rows"]}
    assert list(rows) == ["reference fp32", *names]
    assert all(rows[name]["compiled_graphs"] > 0 for name in names)
    assert 50 < result["settings"]["mean_file_kib"] < 200
    assert result["share_of_ceiling"] is result["distillation_overhead"] is None
    assert [target["met"] for target in result["targets"]][1::2] == [None, None]


def measured_of(name, loss, exact):
    """What is recorded of a contender that took two rounds."""
    start = {"contender": name, "first_loss": loss, "exact": exact, "start_up_s": 1.0, "compiled_graphs": 0}
    round_ = {"contender": name, "steps": 2, "seconds": 1.0, "parts": {"loss": 0.1}}
    return [start | {"resident_bytes": 0, "step_bytes": 2**20}, round_, round_]


@pytest.mark.parametrize(
    ("loss", "exact", "equal"),
    [(2.03, False, True), (2.03, True, False), (2.1, False, False), (math.nan, False, False)],
)
def test_other_training_is_told_and_its_speed_kept(capsys, loss, exact, equal):
    measured = measured_of("reference fp32", 2.0, True) + measured_of("kdav_fast", loss, exact)
    result = step_results.summarise(measured, {"kdav_fast fp32": "no package"}, 8, "cpu")
    assert [row["equal"] for row in result["first_step"]] == [True, equal]
    assert result["ratios_kdav_fast_over"]["reference fp32"] == 1
    step_results.print_table(result)
    printed = capsys.readouterr().out
    assert ("does not train the same" in printed) is not equal
    assert "not measured: no package" in printed


def test_a_contender_that_failed_is_told(capsys):
    measured = [*measured_of("kdav_fast", 2.0, False), {"contender": "reference fp32", "error": "no memory"}]
    result = step_results.summarise(measured, {}, 8, "cpu")
    assert result["not_measured"] == {"reference fp32": "no memory"}
    assert [target["met"] for target in result["targets"]] == [None, None, False, None, None]
    step_results.print_table(result)
    assert "not measured: no memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--root", "empty"], "empty has no class folders"),
        (["--cores", "100000"], "--cores is 100000"),
        (["--contenders", "fastest"], "--contenders has 'fastest'; allowed: 'reference fp32', "),
        (["--fast", "model.compile"], "--fast has 'model.compile'; give KEY=VALUE"),
        (["--fast", "model.speed=1"], "unknown key 'model.speed'"),
        (["--teacher", "cifar:none"], "cifar:none"),
        (["--json", "missing/result.json"], "the folder missing does not exist"),
    ],
)
def test_ends_with_one_line_where_it_cannot_measure(tmp_path, monkeypatch, capsys, arguments, reason):
    save_images(tmp_path / "pictures")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    usual = [*TINY, "--root", "pictures", "--json", "result.json"]
    assert reason in refusal("training_step.py", [*usual, *arguments], monkeypatch, capsys)
    assert not (tmp_path / "result.json").exists()


def test_refuses_to_be_one_of_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE is 2; this benchmark is one process"):
        training_step.check_options(training_step.make_parser().parse_args(TINY))


def test_paired_rounds_tell_checkouts_apart_whatever_the_machine_does():
    """The machine is three times slower in the second pair; the step is a tenth slower in every pair."""
    before = [{"wall": seconds} for seconds in (1.0, 3.0, 1.0)]
    now = [{"wall": 1.1 * one["wall"]} for one in before]
    assert list(step_beside.compare(before, now, "wall").values()) == pytest.approx([1.1, 1.1, 1.1])
    with pytest.raises(AssertionError, match="kdav_fast has loss 2.000000 there and 2.100000 here"):
        step_beside.check_losses({"kdav_fast": 2.0}, {"kdav_fast": 2.1})


def test_only_a_checkout_is_measured_beside_this_one(tmp_path, monkeypatch, capsys):
    line = refusal("step_beside.py", [str(tmp_path)], monkeypatch, capsys)
    assert "has no benchmarks/step_contenders.py; give a checkout of kdav_fast" in line


@pytest.mark.slow
def test_a_checkout_beside_itself(tmp_path):
    arguments = [*TINY, f"--root={save_images(tmp_path)}", *UNCOMPILED, "--rounds=2"]
    process = completed("step_beside.py", [str(BENCHMARKS.parent), *arguments])
    measured = [line.split("  ")[0] for line in process.stdout.splitlines()[-3:]]
    assert measured == ["kdav_fast fp32", "kdav_fast", "kdav_fast synthetic"]
