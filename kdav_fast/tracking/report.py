"""The report of one or several runs: curves as PNG files and one HTML page that opens offline."""

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kdav_fast.errors import InputError
from kdav_fast.runtime.versions import versions
from kdav_fast.tracking.class_report import class_tables, draw_classes
from kdav_fast.tracking.class_results import ClassResults, read_class_results
from kdav_fast.tracking.metrics_log import read_metrics
from kdav_fast.tracking.page_parts import plain, table

# Okabe and Ito's palette, without its yellow, which is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^"  # runs beyond the palette repeat its colours with another marker
FEW_POINTS = 40  # up to here every point gets a marker
SMOOTH_FROM = 200  # from here a noisy curve is drawn faintly under its running median

LABELS = {
    "loss": "loss (nats)",
    "top1": "top-1 accuracy (%)",
    "top5": "top-5 accuracy (%)",
    "lr": "learning rate",
    "images_per_second": "throughput (images/s)",
    "data_wait_share": "waiting for data (share)",
}
HIGHEST = {"top1": 100, "top5": 100, "data_wait_share": 1}
"""Axes of shares show no more than can be."""
SPLITS = {"train": "training", "val": "validation"}
LONGEST_LABEL = 70
LONGEST_NOTE = 100
UNITS = {"_kl": "nats", "_entropy": "nats", "_ms": "ms", "_seconds": "s", "_bytes": "bytes"}
FIGURES = ("losses", "accuracy", "learning_rate", "throughput")  # then those of keys unknown here
# What a training line may hold beside losses; any other `train/` or `val/` key is a part of the loss.
NOT_LOSSES = ("norm", "skipped", "scale", "seconds", "_ms", "share", "bytes", "count")
PAGE = "index.html"
RESULTS = {  # key: (heading, which of its values is best)
    "val/top1": ("val top-1 (%)", max),
    "val/top5": ("val top-5 (%)", max),
    "val/loss": ("val loss", min),
    "train/top1": ("train top-1 (%)", max),
    "train/loss": ("train loss", min),
    "images_per_second": ("images/s", median),
}


@dataclass(frozen=True)
class Run:
    label: str
    lines: list[dict[str, Any]]
    config: str | None
    classes: ClassResults | None = None
    """Of the evaluation at its end; None before that."""

    def series(self, key: str, axis: str) -> tuple[list[float], list[float]]:
        """Positions and values of `key`; a null, which is a value that was not finite, becomes NaN."""
        found = [(line[axis], line[key]) for line in self.lines if key in line]
        points = [(x, math.nan if y is None else y) for x, y in found if y is None or _is_number(y)]
        return [x for x, _ in points], [y for _, y in points]


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
    loaded = [_load(label, run_dir) for label, run_dir in runs.items()]
    every_line_has_epoch = all(line.get("epoch") is not None for run in loaded for line in run.lines)
    axis = "epoch" if every_line_has_epoch else "step"
    try:
        output.mkdir(parents=True, exist_ok=True)
        figures = []
        for group, names in _groups(loaded).items():
            figure = _draw(loaded, names, axis)
            figure.savefig(output / f"{group}.png", dpi=150)
            figures.append((group, (output / f"{group}.png").read_bytes()))
        if by_class := _by_class(loaded):
            draw_classes(by_class, COLOURS).savefig(output / "classes.png", dpi=150)
            figures.append(("classes", (output / "classes.png").read_bytes()))
        page = output / PAGE
        temporary = page.with_name(page.name + ".tmp")
        temporary.write_text(_page(title, loaded, figures, summary or {}), encoding="utf-8")
        temporary.replace(page)  # that the page is there says that the report is whole
    except OSError as error:
        raise InputError(f"report {output}: {error.strerror}; give a folder that can be written") from None
    return page


def _load(label: str, run_dir: Path) -> Run:
    config = run_dir / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None
    return Run(label, read_metrics(run_dir), text, read_class_results(run_dir))


def _by_class(runs: list[Run]) -> dict[str, ClassResults]:
    return {run.label: run.classes for run in runs if run.classes is not None}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _split(key: str) -> tuple[str, str]:
    """`train/loss` -> ("train", "loss"): both splits of a name share a panel. Other keys keep their name."""
    head, separator, tail = key.partition("/")
    return (head, tail) if separator and head in ("train", "val") else ("", key)


def _groups(runs: list[Run]) -> dict[str, dict[str, list[str]]]:
    """Figure name -> panel name -> keys drawn in it."""
    lines = [line for run in runs for line in run.lines]
    keys = dict.fromkeys(key for line in lines for key, value in line.items() if _is_number(value))
    groups: dict[str, dict[str, list[str]]] = {figure: {} for figure in FIGURES}
    for key in keys:
        if key not in ("step", "epoch", "val/images"):
            groups.setdefault(_group(key), {}).setdefault(_split(key)[1], []).append(key)
    return {group: panels for group, panels in groups.items() if panels}


def _group(key: str) -> str:
    split, name = _split(key)
    if name in ("top1", "top5"):
        return "accuracy"
    if name == "lr":
        return "learning_rate"
    if name in ("images_per_second", "data_wait_share"):
        return "throughput"
    if split and not any(part in name for part in NOT_LOSSES):
        return "losses"
    head, separator, _ = name.partition("/")
    family = head if separator else "other"
    return "".join(letter if letter.isalnum() else "_" for letter in family)


def _label(name: str) -> str:
    words = name.replace("_", " ").replace(" kl", " KL")
    unit = next((unit for suffix, unit in UNITS.items() if name.endswith(suffix)), None)
    return LABELS.get(name, f"{words} ({unit})" if unit else words)


def _draw(runs: list[Run], panels: dict[str, list[str]], axis: str) -> Figure:
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
                _curve(axes, index, _split(key)[0], x, y, hidden_by)
            for group in same:
                if len(group) > 1:
                    exactly = len({str(series[i]) for i in group}) == 1  # as text, a gap equals a gap
                    splits = notes.setdefault((tuple(group), exactly), [])
                    splits += {SPLITS.get(_split(key)[0], "")} - set(splits)
        _scale(axes, name)
        if notes:
            said = [
                _alike([labels[i] for i in group], exactly, splits)
                for (group, exactly), splits in notes.items()
            ]
            _note(axes, said)
        axes.set_ylabel(plain(_label(name)), fontsize=11)
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
    if {"train", "val"} <= {_split(key)[0] for keys in panels.values() for key in keys}:
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


CSS = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --paper: #fff; --soft: #5b6570; --line: #d5dae0; --card: #f4f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --paper: #14171a; --soft: #9aa5b1; --line: #343b43; --card: #1e2328 } }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line); white-space: nowrap }
th, td { text-align: left; vertical-align: top } small { display: block }
th, small, footer { color: var(--soft) }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem;
  align-items: start }
figure { margin: 0; padding: .5rem; color: #1b1f24; background: #fff; border: 1px solid var(--line);
  border-radius: .5rem } img { display: block; width: 100% } figcaption { font-weight: 600 }
details { margin: .5rem 0; padding: .5rem .8rem; background: var(--card); border-radius: .5rem }
summary { cursor: pointer } pre { overflow-x: auto; font-size: .85rem }
"""


def _page(title: str, runs: list[Run], figures: list[tuple[str, bytes]], summary: Mapping[str, float]) -> str:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    curves = "\n".join(_figure(group, image, runs) for group, image in figures)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{_summary_table(summary)}
<h2>Results</h2>
{_results_table(runs)}
<h2>Curves</h2>
<p>A faint line is every logged value, the strong one over it their running median.</p>
<div class="figures">
{curves or "<p>No metrics have been logged yet.</p>"}
</div>
{_classes(runs)}
<h2>Configuration</h2>
{"".join(_config(run) for run in runs)}
<footer><p>Report of {now}. Installed when it was written: {escape(_versions())}.</p></footer>
</body>
</html>
"""


def _summary_table(summary: Mapping[str, float]) -> str:
    if not summary:
        return ""
    return "<h2>Summary</h2>\n" + table(["", ""], [[escape(k), _number(v)] for k, v in summary.items()])


def _results_table(runs: list[Run]) -> str:
    shown = {
        key: value for key, value in RESULTS.items() if any(key in line for run in runs for line in run.lines)
    }
    head = ["run", "steps", "epochs", *(heading for heading, _ in shown.values())]
    rows = []
    for run in runs:
        last = run.lines[-1] if run.lines else {}
        row = [escape(run.label), _number(last.get("step")), _number(last.get("epoch"))]
        rows.append(row + [_final_and_best(run, key, best) for key, (_, best) in shown.items()])
    return table(head, rows)


def _classes(runs: list[Run]) -> str:
    by_class = _by_class(runs)
    return f"<h2>Classes</h2>\n{class_tables(by_class)}" if by_class else ""


def _final_and_best(run: Run, key: str, best: Any) -> str:
    lines = [line for line in run.lines if _is_number(line.get(key))]
    if not lines:
        return "-"
    values = [line[key] for line in lines]
    if best is median:
        return f"{_number(values[-1])} <small>median {_number(median(values))}</small>"
    top = lines[values.index(best(values))]
    where = f"epoch {_number(top['epoch'])}" if top.get("epoch") is not None else f"step {top['step']}"
    return f"{_number(values[-1])} <small>best {_number(top[key])}, {where}</small>"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}" if math.isfinite(value) else str(value)
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.4g}"


def _figure(group: str, image: bytes, runs: list[Run]) -> str:
    caption = group.replace("_", " ").capitalize()
    described = escape(f"{caption} of {', '.join(run.label for run in runs)}")
    source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><img alt="{described}" src="{source}"></figure>'
    )


def _config(run: Run) -> str:
    text = "This run folder has no config.yaml." if run.config is None else run.config
    return f"<details><summary>{escape(run.label)}</summary><pre>{escape(text)}</pre></details>\n"


def _versions() -> str:
    return ", ".join(f"{package} {version}" for package, version in versions().items() if version)
