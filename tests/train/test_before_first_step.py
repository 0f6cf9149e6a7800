"""A run that was stopped in the measuring pass, in which it has no student yet."""

import signal

import pytest

from kdav_fast.cli import BAD_INPUT, main
from kdav_fast.runtime.stopping import STOPPED
from kdav_fast.student.heads import EmbeddingHead
from kdav_fast.train.check import check_training
from tests.train.stopped_run import STUDENT, error_line, kdav, student_of


@pytest.fixture
def measuring(config_of, tmp_path, monkeypatch, capsys):
    """The config of a run that was stopped after the third of eight batches of its measuring pass."""
    config = config_of(tmp_path / "run")
    observe, seen = EmbeddingHead.observe, []

    def observe_and_stop(head, *arguments):
        observe(head, *arguments)
        seen.append(head)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingHead, "observe", observe_and_stop)
        assert kdav(config) == STOPPED
    assert len(seen) == 3
    assert "stopped before the first step, state saved; the same command continues" in capsys.readouterr().out
    return config


def test_the_same_command_continues_it(measuring, whole, monkeypatch, capsys):
    observe, seen = EmbeddingHead.observe, []
    monkeypatch.setattr(EmbeddingHead, "observe", lambda *a: (seen.append(a), observe(*a)))
    check_training(measuring)
    assert "would be continued in what comes before distillation" in capsys.readouterr().out
    assert kdav(measuring) == 0
    assert len(seen) == 5
    assert student_of(measuring.run_dir) == student_of(whole)


def test_what_needs_a_student_says_that_there_is_none(measuring, capsys):
    run_dir = measuring.run_dir
    [checkpoint] = run_dir.glob("checkpoints/step-*")
    assert checkpoint.name == "step-00000000"
    assert not (checkpoint / STUDENT).exists()
    for command in ("evaluate", "export"):
        for folder in (run_dir, checkpoint):
            assert main([command, str(folder)]) == BAD_INPUT
            assert error_line(capsys) == (
                f"kdav: error: {folder} holds no student yet: all that was saved comes before the run's first step; "
                "continue the run, or give another one or a weights file"
            )
