"""The report of one or several runs: curves as PNG files and one HTML page that opens offline."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from kdav_fast.errors import InputError
from kdav_fast.runtime.files import write_whole
from kdav_fast.tracking.class_report import draw_classes
from kdav_fast.tracking.curves import COLOURS, draw_curves
from kdav_fast.tracking.logged_run import LoggedRun, is_number
from kdav_fast.tracking.page import page_of
from kdav_fast.tracking.panels import panels

PAGE = "index.html"


def write_report(
    runs: Mapping[str, Path], output: Path, *, title: str, summary: Mapping[str, float] | None = None
) -> Path:
    """Draw the curves of `runs` over each other and write the page about them.

    Args:
        runs: label to run folder, in the order of the legend. A folder needs `metrics.jsonl`; its
            `config.yaml` is shown if it is there.
        output: folder for one PNG a metric group and `index.html`; made if needed.
        title: heading of the page.
        summary: figures to show above everything else, by name.

    Returns:
        The path of `index.html`, which needs no other file.

    Raises:
        InputError: no runs are given, a run has no readable metrics, or `output` cannot be written.
    """
    if not runs:
        raise InputError("a report of no runs; give at least one run folder")
    loaded = [LoggedRun.read(label, run_dir) for label, run_dir in runs.items()]
    every_line_has_epoch = all(line.get("epoch") is not None for run in loaded for line in run.lines)
    axis = "epoch" if every_line_has_epoch else "step"
    by_class = {run.label: run.classes for run in loaded if run.classes is not None}
    drawn = {group: draw_curves(loaded, names, axis) for group, names in panels(_keys(loaded)).items()}
    if by_class:
        drawn["classes"] = draw_classes(by_class, COLOURS)
    page = output / PAGE
    try:
        output.mkdir(parents=True, exist_ok=True)
        images = {name: _saved(figure, output / f"{name}.png") for name, figure in drawn.items()}
        # Last: that the page is there says that the report is whole.
        write_whole(page, page_of(title, loaded, by_class, images, summary or {}))
    except OSError as error:
        raise InputError(f"report {output}: {error.strerror}; give a folder that can be written") from None
    return page


def _keys(runs: list[LoggedRun]) -> list[str]:
    """Of numbers, in the order in which they were first logged."""
    lines = [line for run in runs for line in run.lines]
    return list(dict.fromkeys(key for line in lines for key, value in line.items() if is_number(value)))


def _saved(figure: Figure, file: Path) -> bytes:
    figure.savefig(file, dpi=150)
    return file.read_bytes()
