"""What a complete run leaves: the student first, then the report, which may fail."""

import pytest

from kdav_fast.student.file import read_student
from kdav_fast.train.folder import results
from kdav_fast.train.loop import run_training


@pytest.mark.parametrize(
    "error", [RuntimeError("Can not load\nface"), MemoryError(), OSError(28, "No space left")]
)
def test_a_report_that_fails_costs_no_student(small_config, tmp_path, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    config = small_config(tmp_path / "run", train={"epochs": 0.25, "evaluate_every": 0, "save_every": 0})
    page = config.run_dir / "report" / "index.html"
    with monkeypatch.context() as patch:
        patch.setattr(results, "write_report", fail)
        accuracy = run_training(config)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert (
        f"the report, which 'kdav report {config.run_dir}' makes later, could not be written (" in warnings[0]
    )
    assert read_student(config.run_dir)[1].step == 2
    assert not page.exists()
    assert run_training(config) == accuracy
    assert page.exists()
    written = page.stat().st_mtime_ns
    assert run_training(config) == accuracy
    assert page.stat().st_mtime_ns == written
