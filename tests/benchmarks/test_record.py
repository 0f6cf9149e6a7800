"""A result that grows row by row: whole at any moment, gone on with, and begun anew where it would not be the same."""

import json
import os
import signal
import subprocess
import sys

import pytest
import record
from environment import describe, importable, version
from record import NeverEndedError, Record, failure, leave_if_broken

from tests.benchmarks.scripts import BENCHMARKS

PLACE = {
    "device": "A",
    "threads": 1,
    "cores": 2,
    "python": "3",
    "code": "c",
    "versions": {"torch": "1", "dali": "2"},
}


def derive(rows):
    return {"total": sum(row.get("value", 0) for row in rows)}


@pytest.fixture(autouse=True)
def _own_signals():
    """A record answers the signal to end."""
    kept = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, kept)


@pytest.fixture
def opened(tmp_path):
    """Opens the one file, with changes to what it was opened with before."""

    def open_again(settings=None, versions=None, **place):
        environment = {**PLACE, **place, "versions": PLACE["versions"] | (versions or {})}
        return Record(tmp_path / "result.json", environment, settings or {"size": (1, 2)}, derive)

    return open_again


def test_every_row_is_on_the_disk_with_what_follows(opened, tmp_path):
    first = opened()
    for value in (0.1, 0.2):
        first.add({"name": "x", "value": value})
        assert json.loads((tmp_path / "result.json").read_text())["total"] == sum(
            r["value"] for r in first.rows
        )
    assert opened().rows == [{"name": "x", "value": 0.1}, {"name": "x", "value": 0.2}]
    assert opened().find(name="x", value=0.2) == [{"name": "x", "value": 0.2}]
    assert opened().find(name="y") == []


def test_what_is_found_out_once_is_not_asked_again(opened):
    assert opened().keep("rate", lambda: 3.5) == 3.5
    assert opened().keep("rate", lambda: 4.5) == 3.5


@pytest.mark.parametrize(
    "change",
    [{"settings": {"size": 3}}, {"device": "B"}, {"code": "d"}, {"cores": 1}, {"versions": {"torch": "1.1"}}],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_or_another_place_begin_anew(opened, change):
    opened().add({"value": 1})
    assert opened(**change).rows == []


def test_a_package_that_comes_or_goes_changes_no_row(opened):
    opened(versions={"dali": None}).add({"value": 1})
    opened().add({"value": 2})
    assert len(opened(versions={"dali": None, "other": "9"}).rows) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": 1}', '{"settings": {"size": [1, 2]}}'])
def test_a_file_that_is_no_result_is_begun_anew(opened, tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    assert opened().rows == []


CRASH = """
import os, signal, sys, time
from pathlib import Path
from record import Record
one = Record(Path(sys.argv[1]), {"versions": {}}, {})
with one.attempt("what"):
    print("begun", flush=True)
    if sys.argv[2] == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""


@pytest.mark.parametrize(("way", "held_against"), [("crash", True), ("limit", False)])
def test_what_crashes_twice_is_not_tried_again_but_what_is_stopped_is(tmp_path, way, held_against):
    for _ in range(record.ATTEMPTS):
        process = subprocess.Popen(
            [sys.executable, "-c", CRASH, str(tmp_path / "r.json"), way],
            env={**os.environ, "PYTHONPATH": str(BENCHMARKS)},
            stdout=subprocess.PIPE,
        )
        assert process.stdout.readline() == b"begun\n"
        if way == "limit":
            process.terminate()
        process.communicate(timeout=60)
    opened = Record(tmp_path / "r.json", {"versions": {}}, {})
    if held_against:
        with pytest.raises(NeverEndedError, match="ended the whole program 2 times"), opened.attempt("what"):
            pass
        with opened.attempt("other"):
            pass
    else:
        with opened.attempt("what"):
            pass


def test_an_error_is_told_in_one_line():
    assert failure(RuntimeError("no kernel\nat line 1\n")) == "RuntimeError: no kernel"
    assert failure(MemoryError()) == "MemoryError"
    assert len(failure(ValueError("x" * 1000))) < 400


def test_only_a_broken_device_ends_the_program():
    leave_if_broken(RuntimeError("CUDA out of memory"))
    with pytest.raises(SystemExit) as ended:
        leave_if_broken(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert ended.value.code == record.GO_ON


def test_packages_are_found_without_importing_them(monkeypatch):
    import torch

    assert version("torch") == torch.__version__.split("+")[0]
    assert version("no-such-package") is None
    assert not importable("no_such.package")
    found = describe(torch.device("cpu"), ("torch", "no-such-package"))
    assert found["versions"]["no-such-package"] is None
    assert (
        found["code"]
        == describe(torch.device("cpu"))["code"]
        != describe(torch.device("cpu"), code=("kernels",))["code"]
    )
