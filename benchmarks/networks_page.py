"""`docs/networks.md` from the table of `networks.py`: how many of each kind, and every one that is not like most."""

from collections import Counter
from importlib.metadata import version

_START = "## In numbers\n"


def networks_page(text: str, rows: list) -> str:
    """The page with new tables, below what was written by hand.

    Args:
        text: the page as it is.
        rows: of `networks.Row`.
    """
    tried = [row for row in rows if not row.why.startswith("not tried")]
    left = [row for row in rows if row not in tried]
    libraries = f"timm {version('timm')}, torchvision {version('torchvision')}, {len(rows)} architectures."
    page = [text.partition(_START)[0] + _START, libraries, ""]
    kinds = Counter((_library(row), row.teacher, row.student, row.sizes or "-") for row in tried)
    page += _table(
        ["library", "as teacher", "as student", "sizes", "architectures"],
        [[*kind, str(number)] for kind, number in sorted(kinds.items(), key=lambda it: (it[0][0], -it[1]))]
        + [
            [it, "not tried", "", "", str(number)]
            for it, number in sorted(Counter(map(_library, left)).items())
        ],
    )
    page += ["", "## Not everything", ""]
    page += _table(
        ["network", "as teacher", "as student", "why"],
        [
            [row.name, row.teacher, row.student, row.why]
            for row in tried
            if (row.teacher, row.student) != ("all", "all")
        ],
    )
    page += ["", "## Averaged heads", ""]
    page += _table(["network", "heads"], [[row.name, row.head] for row in tried if " + " in row.head])
    page += ["", "## Their own image size only", ""]
    page += [", ".join(row.name for row in tried if row.sizes == "own") + "."]
    page += [
        "",
        "## Not tried",
        "",
        "Too large for the machine of this table, in millions of parameters, or as said:",
        "",
    ]
    page += [", ".join(_left_out(row) for row in left) + "."]
    return "\n".join(page) + "\n"


def _library(row: tuple) -> str:
    return row.name.partition(":")[0]


def _table(header: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines]]


def _left_out(row: tuple) -> str:
    return f"{row.name} {float(row.parameters):.0f}" if row.parameters else f"{row.name} ({row.why})"
