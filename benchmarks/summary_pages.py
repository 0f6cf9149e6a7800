"""The summary's two forms: Markdown for `docs/benchmarks.md`, and a page that opens offline."""

import base64
from collections.abc import Callable
from html import escape
from pathlib import Path

from summary_results import Result, Table
from summary_targets import Target
from timing import NOISE_LIMIT

from kdav_fast.tracking.page import CSS

TARGETS = ["what", "target", "measured", ""]


def _cells(targets: list[Target]) -> list[list[str]]:
    return [[target.name, target.target, target.measured, target.state] for target in targets]


def measured_on(result: Result) -> str:
    """Device, cores or threads, date and versions in a line."""
    environment = result.environment
    installed = {name: version for name, version in environment["versions"].items() if version}
    versions = ", ".join(f"{name} {version}" for name, version in installed.items())
    for key in ("cores", "threads"):
        if key in environment:
            place = f"{environment['device']}, {environment[key]} {key}"
            break
    else:
        place = environment["device"]
    return f"{place}; {environment['date']}; {versions}"


def _markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """Columns but the first are aligned right where all their cells begin like numbers."""
    numeric = [
        bool(rows) and all(not row[i] or row[i].lstrip("+-")[:1].isdigit() or row[i] == "-" for row in rows)
        for i in range(len(head))
    ]
    rule = ["---:" if right and i else "---" for i, right in enumerate(numeric)]
    lines = [head, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(results: list[Result], targets: list[Target], missing: list[str]) -> str:
    """Targets, then the main tables; the same for the same results."""
    parts = ["Targets:", _markdown_table(TARGETS, _cells(targets))]
    for result in results:
        shown = [table for table in result.tables if table.short]
        for table in shown:
            parts += [f"**{table.title}** (`{result.name}`)", _markdown_table(table.head, table.rows)]
        where = "" if shown else f"`{result.name}`, all of which the report shows: "
        parts.append(f"{where}{measured_on(result)}; `{result.environment['command']}`")
    parts += [f"`{name}`: not measured." for name in missing]
    return "\n\n".join(parts) + "\n"


def table_markdown(results: list[Result], benchmark: str, said: Callable[[dict], str]) -> str:
    """The tables of a benchmark's results for another page, one device after another; empty where there are none.

    Args:
        results: of all benchmarks.
        benchmark: whose.
        said: from a result, what was measured in a line.
    """
    parts = []
    for result in results:
        if result.benchmark == benchmark:
            parts.append(f"{said(result.data)}, {result.environment['date']}:")
            parts += [_markdown_table(table.head, table.rows) for table in result.tables]
    return "\n\n".join(parts)


def _html_table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    top = f"<thead>{line(head, 'th')}</thead>"
    return f'<div class="scroll"><table>\n{top}\n<tbody>\n{body}\n</tbody></table></div>'


def _picture(path: Path, title: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return f'<figure><img alt="{escape(title)}" src="{source}"></figure>'


def _table_section(table: Table) -> str:
    return f"<h3>{escape(table.title)}</h3>\n{_html_table(table.head, table.rows)}"


def _noise(result: Result) -> str:
    noise = result.data.get("noise")
    if not isinstance(noise, int | float):
        return ""
    plain = f"Rounds spread by {noise:.0%} of their median"
    return f"<p>{plain}{': too noisy to trust' if noise > NOISE_LIMIT else ''}.</p>"


def _section(result: Result) -> str:
    parts = [f"<h2>{escape(result.name)}</h2>", f"<p>{escape(measured_on(result))}</p>"]
    parts.append(f"<pre>{escape(str(result.environment['command']))}</pre>")
    parts += [_noise(result), *(_table_section(table) for table in result.tables)]
    if result.picture is not None:
        parts.append(_picture(result.picture, f"Picture of {result.name}"))
    return "\n".join(part for part in parts if part)


def html_page(results: list[Result], targets: list[Target], missing: list[str]) -> str:
    """One page that needs no other file."""
    sections = [_section(result) for result in results]
    sections += [f"<h2>{escape(name)}</h2>\n<p>Not measured.</p>" for name in missing]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kdav_fast: benchmarks</title>
<style>{CSS}</style>
</head>
<body>
<h1>kdav_fast: benchmarks</h1>
<h2>Targets</h2>
{_html_table(TARGETS, _cells(targets))}
{chr(10).join(sections)}
</body>
</html>
"""
