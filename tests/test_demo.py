"""The demonstration's plumbing, with one epoch for each run; `make demo` is the real one."""

import json

import pytest

from kdav_fast import demo
from kdav_fast.cli import main


def test_demo_leaves_its_summary_report_and_exported_student(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_TEACHER_EPOCHS", 1)
    monkeypatch.setattr(demo, "_STUDENT_EPOCHS", 1)
    assert main(["demo", "--run-dir", str(tmp_path / "demo")]) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert set(summary) == {"teacher", "student", "kd", "kdav", "exported"}
    for name in ("teacher", "student", "kd", "kdav"):
        last = json.loads((tmp_path / "demo" / name / "metrics.jsonl").read_text().splitlines()[-1])
        assert summary[name] == pytest.approx(last["val/top1"], abs=0.005)
    assert summary["exported"] == summary["kdav"]
    page = (tmp_path / "demo" / "report" / "index.html").read_text()
    assert all(name in page for name in ("teacher", "student", "kdav"))
    assert f"{summary['kdav']:.2f}" in capsys.readouterr().out
