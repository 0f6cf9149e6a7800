"""Accuracy by class: counted, kept, printed and drawn for few classes, many, and classes without images."""

import json
import math

import numpy as np
import pytest
import torch

from kdav_fast.errors import InputError
from kdav_fast.runtime.processes import Cluster
from kdav_fast.tracking.class_results import ClassTally, read_class_results, write_class_results
from kdav_fast.tracking.meter import correct_counts
from kdav_fast.tracking.report import write_report

ALONE = Cluster(0, 1, 0, 1, torch.device("cpu"))


def tallied(classes: int, images: int, absent: int = 0, seed: int = 0):
    """Results of random answers in batches of 7, the last one padded, and the labels and scores behind them."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes - absent, images)
    scores = generator.normal(size=(images, classes))
    scores[np.arange(images), labels] += 1.5
    tally = ClassTally()
    for start in range(0, images, 7):
        part, target = torch.tensor(scores[start : start + 7]), torch.tensor(labels[start : start + 7])
        missing = 7 - len(part)
        part, target = (torch.cat([t, t[:1].repeat_interleave(missing, 0)]) for t in (part, target))
        tally.update(part, target, torch.arange(7) < 7 - missing)
    names = tuple(f"class {n}" for n in range(classes))
    return tally.results(names, ALONE), labels, scores


def test_scores_that_are_not_finite_are_wrong_and_no_confusion():
    scores = torch.eye(3)[[0, 0, 1, 2]]
    scores[0, 2], scores[2] = math.nan, math.inf
    target, valid = torch.tensor([0, 0, 1, 0]), torch.ones(4, dtype=torch.bool)
    tally = ClassTally()
    tally.update(scores, target, valid)
    results = tally.results(("a", "b", "c"), ALONE)
    assert (results.images, results.first, results.among_five) == ((3, 1, 0), (1, 0, 0), (2, 0, 0))
    assert results.confused == (("a", "c", 1),)
    assert [int(count) for count in correct_counts(scores, target, valid)] == [1, 2]


def test_counts_are_those_of_a_plain_count():
    results, labels, scores = tallied(12, 300, absent=1)
    order = np.argsort(-scores, axis=1)
    for n in range(11):
        mine = labels == n
        assert results.images[n] == mine.sum()
        assert results.top1(n) == pytest.approx(100 * (order[mine, 0] == n).mean())
        assert results.top5(n) == pytest.approx(100 * (order[mine, :5] == n).any(1).mean())
    assert (results.images[11], results.top1(11), results.top5(11)) == (0, None, None)
    for name, other, count in results.confused:
        a, b = int(name.split()[1]), int(other.split()[1])
        assert count == ((labels == a) & (order[:, 0] == b)).sum() > 0
        assert a != b
    counts = [count for *_, count in results.confused]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == (order[:, 0] != labels).sum()


def test_the_table_is_sorted_worst_first_and_has_no_nan():
    results, *_ = tallied(12, 300, absent=1)
    lines = list(results.lines(pairs=3))
    assert lines[0].split() == ["class", "images", "top-1", "%", "top-5", "%"]
    shown = [line.split()[3] for line in lines[1:13]]
    assert shown[-1] == "-"
    assert [float(value) for value in shown[:-1]] == sorted(float(value) for value in shown[:-1])
    assert len(lines) == 1 + 12 + 3
    assert "nan" not in "".join(lines).lower()


def test_what_is_written_is_read_again(tmp_path):
    results, *_ = tallied(1000, 3000, absent=3)
    write_class_results(tmp_path, results, step=7)
    content = json.loads((tmp_path / "per_class.json").read_text())
    assert content["step"] == 7
    assert content["classes"][-1] == {"class": "class 999", "images": 0, "top1": None, "top5": None}
    assert all(math.isfinite(row["top1"]) for row in content["classes"] if row["images"])
    assert read_class_results(tmp_path) == results
    assert read_class_results(tmp_path / "elsewhere") is None
    infinite = '{"classes": [{"class": "a", "images": 1, "top1": Infinity, "top5": 1}], "confused": []}'
    lacking = ('{"classes": [], "confused": []}', '{"classes": [{"class": "a"}]}')
    for damage in ("{", "[]", *lacking, "null", "[" * 100_000, infinite):
        (tmp_path / "per_class.json").write_text(damage)
        with pytest.raises(InputError, match="per_class.json is damaged; remove it"):
            read_class_results(tmp_path)


@pytest.mark.parametrize("classes", [1, 10, 1000])
def test_a_report_shows_few_classes_by_name_and_many_as_a_curve(tmp_path, classes):
    runs = {}
    for number, label in enumerate(("$kd$", "_kdav")):
        run = tmp_path / label
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 1, "epoch": 1.0, "val/top1": 50.0}\n')
        results, *_ = tallied(classes, 4 * classes, absent=classes > 1, seed=number)
        write_class_results(run, results, 1)
        runs[label] = run
    page = write_report(runs, tmp_path / "report", title="t").read_text()
    assert (tmp_path / "report" / "classes.png").stat().st_size > 5000
    assert "<h2>Classes</h2>" in page
    assert page.count("<summary>All classes</summary>") == (2 if classes == 1000 else 0)
    assert page.count(f"class {classes - 1}</td>") >= 2
    assert "nan" not in page.replace("nanosecond", "").split("base64")[0]


def test_runs_without_class_results_have_a_report_all_the_same(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1.0, "val/top1": 50.0}\n')
    assert "<h2>Classes</h2>" not in write_report({"a": tmp_path}, tmp_path / "report", title="t").read_text()
