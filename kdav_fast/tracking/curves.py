"""The curves of one or several runs over each other, as a report shows them."""

import math
from itertools import pairwise
from statistics import median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kdav_fast.tracking.logged_run import LoggedRun
from kdav_fast.tracking.page_parts import plain
from kdav_fast.tracking.panels import axis_label, split_and_name

# Okabe and Ito's palette, without its yellow, which is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^"  # runs beyond the palette repeat its colours with another marker
FEW_POINTS = 40  # up to here every point gets a marker
SMOOTH_FROM = 200  # from here a noisy curve is drawn faintly under its running median
HIGHEST = {"top1": 100, "top5": 100, "data_wait_share": 1}
"""Axes of shares show no more than can be."""
SPLITS = {"train": "training", "val": "validation"}
LONGEST_LABEL = 70
LONGEST_NOTE = 100


def draw_curves(runs: list[LoggedRun], panels: dict[str, list[str]], axis: str) -> Figure:
    """A figure with its panels, one under the other, in each the curves of all runs.

    Args:
        runs: in the order of the legend.
        panels: panel name -> keys drawn in it.
        axis: "epoch" or "step".
    """
    height = 2.9 if len(panels) < 3 else 2.2
    labels = _legend_labels([run.label for run in runs])
    columns = _legend_columns(labels)
    rows = len(labels) / columns
    figure = Figure(figsize=(6.4, height * len(panels) + 0.6 + 0.2 * max(0, rows - 2)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, keys) in zip(all_axes, panels.items(), strict=True):
        notes = {}
        for key in sorted(keys):  # validation after training, so on top of it
            series = [run.series(key, axis) for run in runs]
            same = _coinciding(series)
            for index, (x, y) in enumerate(series):
                hidden_by = sum(other > index for other in same[index])
                _curve(axes, index, split_and_name(key)[0], x, y, hidden_by)
            for group in same:
                if len(group) > 1:
                    exactly = len({str(series[i]) for i in group}) == 1  # as text, a gap equals a gap
                    splits = notes.setdefault((tuple(group), exactly), [])
                    splits += {SPLITS.get(split_and_name(key)[0], "")} - set(splits)
        _scale(axes, name)
        if notes:
            said = [
                _alike([labels[i] for i in group], exactly, splits)
                for (group, exactly), splits in notes.items()
            ]
            _note(axes, said)
        axes.set_ylabel(plain(axis_label(name)), fontsize=11)
        axes.grid(True, color="#d8d8d8", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=10)
    end = max((line[axis] for run in runs for line in run.lines), default=0)
    if end > 0:
        all_axes[-1].set_xlim(-0.02 * end, 1.02 * end)
    all_axes[-1].set_xlabel("epoch" if axis == "epoch" else "optimizer step", fontsize=11)
    handles = [
        Line2D([], [], label=plain(label), linewidth=2.2, **_colour_and_marker(index, always=False))
        for index, label in enumerate(labels)
    ]
    if {"train", "val"} <= {split_and_name(key)[0] for keys in panels.values() for key in keys}:
        handles.append(Line2D([], [], color="#555555", linestyle="--", label="training"))
        handles.append(Line2D([], [], color="#555555", label="validation"))
    columns = min(columns, 2 if len(handles) == 4 else 3)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def _legend_labels(labels: list[str]) -> list[str]:
    """Short enough for the figure, and still different from each other."""
    short = [label if len(label) <= LONGEST_LABEL else _middle_cut(label) for label in labels]
    return [f"{label} ({n + 1})" if short.count(label) > 1 else label for n, label in enumerate(short)]


def _middle_cut(label: str) -> str:
    half = LONGEST_LABEL // 2 - 2
    return f"{label[:half]} ... {label[-half:]}"


def _legend_columns(labels: list[str]) -> int:
    longest = max(map(len, labels), default=0)
    return 3 if longest <= 22 else 2 if longest <= 36 else 1


def _coinciding(series: list[tuple[list[float], list[float]]]) -> list[list[int]]:
    """For each run the runs, itself included, whose curve looks the same: one would be drawn over the other."""
    finite = [value for _, y in series for value in y if math.isfinite(value)]
    tolerance = 1e-3 * (max(finite) - min(finite)) if finite else 0.0

    def same(a: tuple[list[float], list[float]], b: tuple[list[float], list[float]]) -> bool:
        return a[0] == b[0] and all(
            abs(v - w) <= tolerance or (math.isnan(v) and math.isnan(w))
            for v, w in zip(a[1], b[1], strict=True)
        )

    return [[j for j, other in enumerate(series) if one[0] and same(one, other)] for one in series]


def _alike(labels: list[str], exactly: bool, splits: list[str]) -> str:
    where = " and ".join(filter(None, splits))
    how = "identical" if exactly else "nearly identical"
    return f"{how}{f' in {where}' if where else ''}: {' = '.join(labels)}"


def _note(axes: Any, notes: list[str]) -> None:
    """In small print above a panel, each cut where the panel ends."""
    cut = [note if len(note) <= LONGEST_NOTE else f"{note[: LONGEST_NOTE - 4]} ..." for note in notes[:3]]
    axes.set_title(plain("\n".join(cut)), fontsize=8, color="#555555", loc="right", pad=6)


def _colour_and_marker(index: int, always: bool) -> dict[str, str]:
    cycle = index // len(COLOURS)
    marker = MARKERS[cycle % len(MARKERS)] if always or cycle else ""
    return {"color": COLOURS[index % len(COLOURS)], "marker": marker}


def _curve(axes: Any, index: int, split: str, x: list[float], y: list[float], hidden_by: int = 0) -> None:
    """Draw one run. Where `hidden_by` later ones coincide with it, it is so wide that it shows under them."""
    style = _colour_and_marker(index, always=True)
    if len(y) >= SMOOTH_FROM and _is_noisy(y):
        axes.plot(x, y, color=style["color"], linewidth=0.6, alpha=0.25)
        every = max(1, len(y) // 1000)
        x, y = x[::every], _running_median(y, len(y) // 80, every)
    if split == "train":
        style |= {"linestyle": "--", "markerfacecolor": "white"}
    markevery = _marked(y, also_some=index >= len(COLOURS))
    wider = 2.2 * min(hidden_by, 4)
    width = (1.3 if split == "train" else 1.8) + wider
    axes.plot(x, y, **style, linewidth=width, markersize=4 + wider, markevery=markevery)


def _marked(y: list[float], also_some: bool) -> list[int]:
    """All points of a short curve; of a long one those between two gaps, which have no line to show them."""
    if len(y) <= FEW_POINTS:
        return list(range(len(y)))
    padded = [math.nan, *y, math.nan]
    alone = {i for i in range(len(y)) if math.isnan(padded[i]) and math.isnan(padded[i + 2])}
    return sorted(alone | set(range(0, len(y), len(y) // 10) if also_some else ()))


def _is_noisy(y: list[float]) -> bool:
    """Whether the curve keeps turning round: a loss does, a schedule or a counter does not."""
    steps = [after - before for before, after in pairwise(y)]
    return sum(a * b < 0 for a, b in pairwise(steps)) > len(y) / 4


def _running_median(y: list[float], reach: int, every: int = 1) -> list[float]:
    """Median over `reach` values on each side of every `every`-th, gaps left out; a gap itself stays one."""
    smooth = []
    for i in range(0, len(y), every):
        value = y[i]
        near = [v for v in y[max(0, i - reach) : i + reach + 1] if not math.isnan(v)]
        smooth.append(math.nan if math.isnan(value) else median(near))
    return smooth


def _scale(axes: Any, name: str) -> None:
    """Logarithmic where a value spans orders of magnitude; a rate only if it falls in steps, because a
    cosine ends near 0, which the logarithm would inflate."""
    curves = [[value for value in line.get_ydata() if math.isfinite(value)] for line in axes.lines]
    values = [value for curve in curves for value in curve]
    limit = HIGHEST.get(name)
    if name in ("images_per_second", "data_wait_share"):
        axes.set_ylim(bottom=0)
    if limit is not None and all(0 <= value <= limit for value in values):
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0), min(high, limit))
        for line in axes.lines:  # a curve along the limit keeps its whole width
            line.set_clip_on(False)
    elif (
        name not in HIGHEST and name != "images_per_second" and values and 0 < min(values) < max(values) / 90
    ):
        in_steps = all(len(set(curve)) * 4 < len(curve) for curve in curves)
        axes.set_yscale("log" if name != "lr" or in_steps else "linear")
