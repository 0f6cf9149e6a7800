"""The reading benchmark runs on a handful of files, and its file says what it must. No speed is asserted."""

import json

import numpy as np
import pytest

from tests.benchmarks.scripts import completed, refusal


@pytest.mark.slow
def test_its_medians_and_ratios_are_those_of_its_rounds(tmp_path):
    arguments = ["--images=6", "--batch-size=4", "--cores=1", "--rounds=2", f"--json={tmp_path}/result.json"]
    completed("reading.py", [*arguments, "--round-seconds=0.02", "--work-ms=0.1"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert not [one for one in result["rounds"] if "error" in one]
    rates = {}
    for one in result["rounds"]:
        rates.setdefault((one["way"], one["main"]), []).append(one["images_per_s"])
    assert {len(found) for found in rates.values()} == {2}
    assert len(rates) == 3 + 6 * 3
    medians = {(row["way"], row["main"]): row["median_images_per_s"] for row in result["rows"]}
    assert medians == {key: pytest.approx(np.median(found)) for key, found in rates.items()}
    for row in result["rows"]:
        found = [one for one in result["rounds"] if (one["way"], one["main"]) == (row["way"], row["main"])]
        if row["main"] != "idle":
            lost = [1e3 * (one["batch_s"] - one["work_alone_s"]) for one in found]
            assert row["lost_ms"] == pytest.approx(np.median(lost))
    for main, end in (("python", ""), ("launches", " into DALI"), ("idle", ", decoded")):
        quotients = np.divide(rates[f"process{end}", main], rates[f"threads{end}", main])
        assert result["process_over_threads"][f"{main}{end}"] == pytest.approx(np.median(quotients))
    assert result["process_over_threads"]["python, decoded"] is None
    (target,) = result["targets"]
    assert target["measured"] == medians["process", "launches"]
    assert 60 < result["settings"]["mean_file_kib"] < 160
    assert str(tmp_path) not in json.dumps(result)


def test_ends_with_one_line_where_it_cannot_measure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "--cores is 1000" in refusal(
        "reading.py", ["--cores=1000", "--images=2", "--json=r.json"], monkeypatch, capsys
    )
    assert "the folder missing does not exist" in refusal(
        "reading.py", ["--json=missing/r.json"], monkeypatch, capsys
    )
