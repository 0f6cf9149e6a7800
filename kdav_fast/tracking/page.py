"""The page of a report: one HTML file that opens offline."""

import base64
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from html import escape
from statistics import median
from typing import Any

from kdav_fast.runtime.versions import versions
from kdav_fast.tracking.class_report import class_tables
from kdav_fast.tracking.class_results import ClassResults
from kdav_fast.tracking.logged_run import LoggedRun, is_number
from kdav_fast.tracking.page_parts import table

RESULTS = {  # key: (heading, which of its values is best)
    "val/top1": ("val top-1 (%)", max),
    "val/top5": ("val top-5 (%)", max),
    "val/loss": ("val loss", min),
    "train/top1": ("train top-1 (%)", max),
    "train/loss": ("train loss", min),
    "images_per_second": ("images/s", median),
}
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


def page_of(
    title: str,
    runs: list[LoggedRun],
    by_class: Mapping[str, ClassResults],
    figures: Mapping[str, bytes],
    summary: Mapping[str, float],
) -> str:
    """The page's HTML.

    Args:
        title: its heading.
        runs: in the order of their rows.
        by_class: of the runs that have such results, by label.
        figures: PNG files by name.
        summary: figures to show above everything else, by name.
    """
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    curves = "\n".join(_figure(group, image, runs) for group, image in figures.items())
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
{_classes(by_class)}
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


def _results_table(runs: list[LoggedRun]) -> str:
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


def _classes(by_class: Mapping[str, ClassResults]) -> str:
    return f"<h2>Classes</h2>\n{class_tables(by_class)}" if by_class else ""


def _final_and_best(run: LoggedRun, key: str, best: Any) -> str:
    lines = [line for line in run.lines if is_number(line.get(key))]
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


def _figure(group: str, image: bytes, runs: list[LoggedRun]) -> str:
    caption = group.replace("_", " ").capitalize()
    described = escape(f"{caption} of {', '.join(run.label for run in runs)}")
    source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><img alt="{described}" src="{source}"></figure>'
    )


def _config(run: LoggedRun) -> str:
    text = "This run folder has no config.yaml." if run.config is None else run.config
    return f"<details><summary>{escape(run.label)}</summary><pre>{escape(text)}</pre></details>\n"


def _versions() -> str:
    return ", ".join(f"{package} {version}" for package, version in versions().items() if version)
