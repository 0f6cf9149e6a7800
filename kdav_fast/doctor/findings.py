"""What a diagnosis says, and how it is shown."""

from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdav_fast.runtime.json_text import json_text

State = Literal["on", "off", "info"]


@dataclass(frozen=True)
class Finding:
    """One answer. `detail` says what was found, or why it is off; `remedy` what would turn it on."""

    area: str
    name: str
    state: State
    detail: str
    remedy: str = ""


def print_diagnosis(findings: list[Finding], console: Console) -> None:
    """A table on a terminal, one plain line a finding elsewhere."""
    if not console.is_terminal:
        for finding in findings:
            remedy = f" | to turn on: {finding.remedy}" if finding.remedy else ""
            line = f"{finding.state:4} {finding.area} / {finding.name}: {finding.detail}{remedy}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    table = Table("area", "what", "state", "found, and what would turn it on", show_lines=True)
    colours = {"on": "green", "off": "yellow", "info": "cyan"}
    for finding in findings:
        remedy = f"\n[bold]to turn on:[/bold] {escape(finding.remedy)}" if finding.remedy else ""
        state = f"[{colours[finding.state]}]{finding.state}[/]"
        table.add_row(finding.area, finding.name, state, escape(finding.detail) + remedy)
    console.print(table)


def diagnosis_json(findings: list[Finding]) -> str:
    """The findings as a JSON list of objects with the fields of `Finding`."""
    return json_text([asdict(finding) for finding in findings], indent=2)
