"""The comparison of all methods: what is chosen by which images, and a whole small run."""

import json

import method_accuracy
import pytest
from method_accuracy_results import cells, summarize

from tests.benchmarks.scripts import completed
from tests.benchmarks.test_accuracy import NETWORKS, folder  # noqa: F401  (a fixture)


def result(method, lr=0.1, seed=0, held_out=50.0, top1=40.0):
    """What training would give."""
    return {
        "task": {"method": method, "seed": seed, "lr": lr, "distiller": {"name": method}},
        "held_out_top1": held_out,
        "top1": top1,
        "minutes": 1.0,
        "curve": [(1, 1.0, top1)],
    }


def test_learning_rates_are_chosen_by_held_out_images():
    tried = [
        result("kd", 0.05, held_out=50, top1=90),
        result("kd", 0.1, held_out=51),
        result("kd", 0.3, held_out=49),
        result("at", 0.05),  # not tried at all of them yet
    ]
    assert method_accuracy.best_rates(tried) == {"kd": 0.1}


def test_further_seeds_are_of_the_best_on_held_out_images():
    first = [result(name, held_out=value, top1=-value) for name, value in (("kd", 3), ("at", 5), ("sp", 4))]
    first.append(result("kd", seed=1, held_out=9))
    assert method_accuracy.best_methods(first, 2) == ["at", "sp"]


def test_a_row_a_method_the_best_first():
    kd, at = summarize(
        [result("kd", lr, 100, lr) for lr in (0.05, 0.1, 0.3)],
        [result("at", top1=30), result("kd", seed=1, top1=50), result("kd", seed=0, top1=46)],
    )
    assert (kd["method"], kd["top1"], kd["mean_top1"], kd["seeds"]) == ("kd", [46, 50], 48, [0, 1])
    assert kd["held_out_top1_by_lr"] == {"0.05": 0.05, "0.1": 0.1, "0.3": 0.3}
    assert (at["method"], at["std_top1"]) == ("at", None)


def test_gains_are_over_labels_only():
    trained = [result("kd", top1=50.0), result("none", top1=46.0), result("at", top1=45.0)]
    shown = {row[0]: row[3] for row in cells(summarize([], trained))}
    assert shown == {"kd": "+4.00", "none": "-", "at": "-1.00"}
    assert [row[3] for row in cells(summarize([], trained[:1]))] == ["-"]


@pytest.mark.slow
def test_a_small_run_of_methods_of_every_kind(folder):  # noqa: F811
    """Maps, turned images, pairs of a class, several views and no teacher; gone on with once."""
    arguments = ["--device=cpu", f"--root={folder}/images", f"--teacher={folder}/teacher.safetensors"]
    arguments += ["--workers=1", f"--work={folder}/work", "--eager", "--epochs=1", "--tuning-epochs=1"]
    arguments += ["--train-subset=130", "--seeds=2", f"--json={folder}/result.json"]
    every = ["kdav", "at", "sskd", "cskd", "cocord", "none"]
    completed("method_accuracy.py", [*arguments, "--methods", *every[:1], "--override", *NETWORKS])
    log = folder / "work" / "students.jsonl"
    lines = log.read_text().splitlines()
    assert len(lines) == 3 + 2  # rates, seeds
    completed("method_accuracy.py", [*arguments, "--methods", *every, "--override", *NETWORKS])
    assert log.read_text().splitlines()[: len(lines)] == lines
    record = json.loads((folder / "result.json").read_text())
    assert {row["method"] for row in record["rows"]} == set(every)
    assert sorted(len(row["seeds"]) for row in record["rows"]) == [1, *[2] * 5]
    assert str(folder) not in json.dumps(record)
