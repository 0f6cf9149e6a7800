"""Accuracy by class as a report shows it: bars of a few classes, a curve over the ranks of many, and tables."""

from collections.abc import Mapping
from html import escape

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kdav_fast.tracking.class_results import ClassResults, in_percent
from kdav_fast.tracking.page_parts import plain, table

MOST_BARS = 30
"""Up to so many classes, each has a bar with its name."""
_MOST_ROWS = 20
_MOST_PAIRS = 10


def draw_classes(runs: Mapping[str, ClassResults], colours: tuple[str, ...]) -> Figure:
    """Top-1 of every class, worst first: by label of the run, in the colours of its curves."""
    first = next(iter(runs.values()))
    same = all(results.names == first.names for results in runs.values())
    few = same and len(first.names) <= MOST_BARS
    height = 0.9 + 0.24 * len(first.names) * max(1.0, 0.5 * len(runs)) if few else 3.5
    figure = Figure(figsize=(6.4, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    (_bars if few else _ranks)(axes, runs, colours)
    (axes.set_xlim if few else axes.set_ylim)(0, 100)
    axes.grid(True, axis="x" if few else "both", color="#d8d8d8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def _bars(axes, runs: Mapping[str, ClassResults], colours: tuple[str, ...]) -> None:
    first = next(iter(runs.values()))
    order = first.worst_first()
    rows, thickness = np.arange(len(order)), 0.8 / len(runs)
    for number, (label, results) in enumerate(runs.items()):
        place = rows + (number - (len(runs) - 1) / 2) * thickness
        values = [results.top1(n) or 0.0 for n in order]
        axes.barh(place, values, thickness, label=plain(label), color=colours[number % len(colours)])
    names = [_short(first.names[n]) + (" (no images)" if not first.images[n] else "") for n in order]
    axes.set_yticks(rows, [plain(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("top-1 accuracy (%)", fontsize=11)


def _ranks(axes, runs: Mapping[str, ClassResults], colours: tuple[str, ...]) -> None:
    for number, (label, results) in enumerate(runs.items()):
        values = [results.top1(n) for n in results.worst_first() if results.images[n]]
        axes.plot(range(1, len(values) + 1), values, label=plain(label), color=colours[number % len(colours)])
    axes.set_xlabel("classes, worst first", fontsize=11)
    axes.set_ylabel("top-1 accuracy (%)", fontsize=11)


def class_tables(runs: Mapping[str, ClassResults]) -> str:
    """HTML: for each run the worst classes, all of them folded away where they are many, and the confused pairs."""
    return "\n".join(_tables_of(label, results) for label, results in runs.items())


def _tables_of(label: str, results: ClassResults) -> str:
    order = results.worst_first()
    rows = [
        [
            escape(results.names[n]),
            f"{results.images[n]:,}",
            in_percent(results.top1(n)),
            in_percent(results.top5(n)),
        ]
        for n in order
    ]
    head = ["class", "images", "top-1 (%)", "top-5 (%)"]
    parts = [f"<h3>{escape(label)}</h3>"]
    if len(rows) <= MOST_BARS:
        parts.append(table(head, rows))
    else:
        parts.append(
            f"<p>The worst {_MOST_ROWS} of {len(rows):,} classes:</p>{table(head, rows[:_MOST_ROWS])}"
        )
        parts.append(f"<details><summary>All classes</summary>{table(head, rows)}</details>")
    if results.confused:
        pairs = [[escape(a), escape(b), f"{count:,}"] for a, b, count in results.confused[:_MOST_PAIRS]]
        parts.append("<p>Most often confused:</p>" + table(["class", "taken for", "images"], pairs))
    return "\n".join(parts)


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else name[: most - 3] + "..."
