import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdav_fast.errors import InputError
from kdav_fast.tracking.metrics_log import MetricsLog, read_metrics


def scalars(run_dir, key):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def write_steps(run_dir, steps, resume_step=None, offset=0.0):
    with MetricsLog(run_dir, resume_step) as log:
        for step in steps:
            log.write(step, {"epoch": step / 10, "train/loss": step + offset})


def test_a_line_starts_with_step_and_is_on_disk_before_close(tmp_path):
    log = MetricsLog(tmp_path / "deep" / "run", None)
    log.write(5, {"train/loss": 1.5, "val/images": 7, "note": "warm"})
    text = (tmp_path / "deep" / "run" / "metrics.jsonl").read_text()
    assert text == '{"step": 5, "train/loss": 1.5, "val/images": 7, "note": "warm"}\n'
    assert scalars(tmp_path / "deep" / "run", "val/images") == [(5, 7.0)]  # flushed as well
    log.close()


def test_text_is_not_a_scalar(tmp_path):
    with MetricsLog(tmp_path, None) as log:
        log.write(1, {"note": "warm", "lr": 0.1})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["lr"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_is_null_in_json_and_itself_in_tensorboard(tmp_path, value):
    def reject(constant):
        raise AssertionError(f"{constant} is not JSON")

    with MetricsLog(tmp_path, None) as log:
        log.write(1, {"train/loss": value})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=reject)
    assert line == {"step": 1, "train/loss": None}
    [(_, shown)] = scalars(tmp_path, "train/loss")
    assert shown == value or (math.isnan(value) and math.isnan(shown))


def test_resume_drops_what_came_after_the_restored_step(tmp_path):
    write_steps(tmp_path, [10, 20, 30, 40])
    write_steps(tmp_path, [30, 40, 50], resume_step=20, offset=0.5)
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == [
        (10, 10.0),
        (20, 20.0),
        (30, 30.5),
        (40, 40.5),
        (50, 50.5),
    ]
    assert scalars(tmp_path, "train/loss") == [(10, 10.0), (20, 20.0), (30, 30.5), (40, 40.5), (50, 50.5)]
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


def test_resume_drops_a_torn_line_even_if_it_is_early_enough_or_complete_json(tmp_path):
    write_steps(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    for torn in ('{"step": 3, "train/lo', '{"step": 3}'):
        path.write_text(path.read_text() + torn)
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
        MetricsLog(tmp_path, 3).close()
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_starting_over_begins_an_empty_file(tmp_path):
    write_steps(tmp_path, [0, 1, 2])
    write_steps(tmp_path, [0], offset=9.0)
    assert [line["train/loss"] for line in read_metrics(tmp_path)] == [9.0]
    assert scalars(tmp_path, "train/loss") == [(0, 9.0)]


def test_missing_file_names_the_path_and_the_way_out(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl: No such file.*give a run's folder") as caught:
        read_metrics(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", [b"not json\n", b"[1]\n", b'{"epoch": 1}\n', b"\xff\xfe\n", b"\n", b"[" * 100_000 + b"\n"]
)
def test_a_complete_but_foreign_line_is_an_input_error_that_names_it(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + text)
    with pytest.raises(InputError, match="line 2"):
        read_metrics(tmp_path)
    with pytest.raises(InputError, match="line 2"):
        MetricsLog(tmp_path, 1)
    assert path.read_bytes() == b'{"step": 1}\n' + text  # refused, not repaired away


def test_a_run_dir_that_cannot_be_a_folder_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"run_dir .*give a folder that can be written"):
        MetricsLog(tmp_path / "file", None)
