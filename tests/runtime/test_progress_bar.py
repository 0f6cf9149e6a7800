"""The bar at every width: it is long enough to be read, and no figure is cut."""

import fcntl
import io
import os
import re
import select
import struct
import termios

import pytest

from kdav_fast.runtime.progress_bar import MIN_CELLS, ProgressBar
from kdav_fast.tracking import status as progress_module
from kdav_fast.tracking.status import StatusLine

VALUES = {
    "train/loss": 2.3456789,
    "train/top1": 45.678,
    "images_per_second": 12345.6,
    "train/loss/membership_kl": 1.23456,
    "train/loss/prediction_kl": 1.23456,
    "data_wait_share": 0.01,
    "lr": 0.1,
}
FIGURES = ["loss 2.346", "top-1 45.7 %", "12,346 images/s"]


class Terminal(io.TextIOWrapper):
    """A pseudo-terminal to write to; `screen` is what has been written since the last look."""

    def __init__(self, columns):
        self.reader, writer = os.openpty()
        super().__init__(os.fdopen(writer, "wb", buffering=0), encoding="utf-8", write_through=True)
        self.resize(columns)

    def resize(self, columns):
        fcntl.ioctl(self.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def screen(self):
        written = b""
        while select.select([self.reader], [], [], 0.05)[0]:  # the kernel hands it over a little later
            written += os.read(self.reader, 1 << 16)
        return written.decode()

    def last_line(self):
        return self.screen().split("\r")[-1].rstrip()


class First:
    is_first = True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("COLUMNS", raising=False)

    def make(columns):
        made = Terminal(columns)
        monkeypatch.setattr("sys.stderr", made)
        return made

    return make


def cells(line):
    return len(re.search(r"\|(.*)\|", line)[1])


@pytest.mark.parametrize(
    ("columns", "shown"), [(30, 0), (40, 0), (60, 1), (80, 2), (100, 3), (160, 3), (250, 3), (0, 2)]
)
def test_training_bar(terminal, columns, shown):
    screen = terminal(columns)
    bar = StatusLine(First(), 1234, 250_000)
    bar.advance()
    screen.screen()
    bar.show(1235, VALUES)
    line = screen.last_line()
    bar.close()
    assert len(line) <= (columns or 80)
    assert cells(line) >= MIN_CELLS
    assert line.endswith(("left", *FIGURES))
    assert [figure for figure in FIGURES if figure in line] == FIGURES[:shown]
    assert re.search(r"(\d+:)?\d+:\d\d left|\? left", line)
    if columns >= 60 or not columns:
        assert "1235/250000" in line


def test_the_bar_follows_the_terminal(terminal):
    screen = terminal(160)
    bar = StatusLine(First(), 0, 100)
    bar.show(1, VALUES)
    line = screen.last_line()
    assert all(figure in line for figure in FIGURES)
    screen.resize(45)
    bar.show(2, VALUES)
    line = screen.last_line()
    bar.close()
    assert len(line) <= 45
    assert cells(line) >= MIN_CELLS


@pytest.mark.parametrize("columns", [40, 60, 80, 160, 250])
@pytest.mark.parametrize("name", ["evaluate", "measure teacher", "checking train"])
def test_other_bars(terminal, columns, name):
    screen = terminal(columns)
    with ProgressBar(range(1_000_000), name, disable=None):
        line = screen.last_line()
    assert len(line) <= columns
    assert cells(line) >= MIN_CELLS
    assert "left" in line


def test_an_evaluation_is_a_line_above_the_bar(terminal):
    screen = terminal(80)
    bar = StatusLine(First(), 0, 100)
    bar.show(8, {"val/top1": 50.0, "val/loss": 1.25})
    written = screen.screen()
    bar.close()
    assert "step 8/100  val/top1 50  val/loss 1.25\r\n" in written


@pytest.mark.parametrize("kind", ["no terminal", "dumb"])
def test_without_a_terminal_that_can_there_are_plain_lines(terminal, monkeypatch, capsys, kind):
    said = []
    monkeypatch.setattr(progress_module, "say", said.append)
    if kind == "dumb":
        screen = terminal(80)
        monkeypatch.setenv("TERM", "dumb")
    bar = StatusLine(First(), 0, 100)
    bar.advance()
    bar.show(1, {"train/loss": 2.5, "lr": 0.1})
    for _ in ProgressBar(range(3), "evaluate", disable=None):
        pass
    bar.close()
    assert said == ["step 1/100  train/loss 2.5  lr 0.1"]
    assert (screen.screen() if kind == "dumb" else capsys.readouterr().err) == ""


def test_a_figure_is_no_format(terminal):
    screen = terminal(100)
    with ProgressBar(total=3, disable=None) as bar:
        bar.show_figures(["{loss} 1"])
        assert "{loss} 1" in screen.screen()


def test_without_a_total_it_only_counts(terminal):
    screen = terminal(60)
    with ProgressBar(disable=None, desc="reading"):
        assert "reading: 0it" in screen.screen()
