"""All results on one page and in the README: what was measured, on what, and which targets are met.

    python benchmarks/summary.py [--results FOLDER] [--readme FILE]
    python benchmarks/summary.py --compare OLD_FOLDER [--results FOLDER]

Reads the results of the other benchmarks, and writes `report.html`, which opens offline, and `summary.md` beside
them. The README's text between its two markers becomes that summary. A target without a result is shown as not
measured. With `--compare`, nothing is written: it prints by how much the medians that two folders share differ.
"""

import argparse
from pathlib import Path
from typing import Any

from command_line import RESULT_FOLDER, Parser
from summary_pages import html_page, markdown
from summary_results import RESULTS, Result, read_results
from summary_targets import all_targets
from timing import NOISE_LIMIT

from kdav_fast.errors import InputError

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
LABELS = ("shape", "pass", "implementation", "loader", "contender", "method", "series", "processes")
"""Keys that say what a median is of."""
NOISE_PERCENT = 100 * NOISE_LIMIT


def replaced(readme: Path, summary: str) -> str:
    """The README's text with the summary between its markers.

    Raises:
        InputError: it cannot be read, or its markers are not there once each, in order.
    """
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--readme {readme}: {error.strerror}; give the README to update") from None
    begin, end = text.find(BEGIN), text.find(END)
    if not 0 <= begin < end or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(
            f"{readme} needs the lines '{BEGIN}' and '{END}' once each, in this order, around the place of the "
            "summary; add them"
        )
    return f"{text[: begin + len(BEGIN)]}\n{summary.strip()}\n{text[end:]}"


def medians(value: Any, label: tuple[str, ...] = ()) -> dict[str, float]:
    """Every median in a result, by what it is of. Single collectives are left out: a step has many."""
    if isinstance(value, list):
        return {key: number for one in value for key, number in medians(one, label).items()}
    if not isinstance(value, dict):
        return {}
    label = (*label, *(str(value[key]) for key in LABELS if key in value))
    found = {}
    for key, inner in value.items():
        if key.startswith("median_") and isinstance(inner, int | float):
            found[", ".join((*label, key))] = float(inner)
        elif key in ("rows", "pieces", "alone", "run"):
            found |= medians(inner, (*label, key) if key in ("alone", "run") else label)
    return found


def compare(new: list[Result], old: list[Result]) -> str:
    """By how much the medians of two folders differ, and whether this machine repeats them."""
    lines, changes = [], []
    earlier = {result.name: result for result in old}
    for result in new:
        before = earlier.get(result.name)
        if before is None:
            continue
        differing = [
            what
            for what, a, b in (
                ("device", result.environment.get("device"), before.environment.get("device")),
                ("settings", result.data.get("settings"), before.data.get("settings")),
            )
            if a != b
        ]
        if differing:
            lines.append(f"{result.name}: not compared, other {' and '.join(differing)}")
            continue
        values, shared = medians(result.data), medians(before.data)
        for what in (what for what in values if shared.get(what)):
            change = 100 * (values[what] / shared[what] - 1)
            changes.append(abs(change))
            lines.append(f"{result.name}: {what}: {shared[what]:.4g} -> {values[what]:.4g} ({change:+.1f} %)")
    if not changes:
        verdict = "no median is in both folders: nothing to compare"
    elif max(changes) <= NOISE_PERCENT:
        verdict = (
            f"all {len(changes)} medians are within {NOISE_PERCENT:.0f} %: the largest change is "
            f"{max(changes):.1f} %"
        )
    else:
        beyond = sum(change > NOISE_PERCENT for change in changes)
        verdict = (
            f"{beyond} of {len(changes)} medians differ by more than {NOISE_PERCENT:.0f} %, the most by "
            f"{max(changes):.1f} %: the code changed, or this machine is too noisy"
        )
    return "\n".join([*lines, verdict])


def run(options: argparse.Namespace) -> None:
    """Raises InputError for what the user can mend."""
    results = read_results(options.results)
    if options.compare is not None:
        print(compare(results, read_results(options.compare)))
        return
    targets = all_targets(results)
    missing = [name for name in RESULTS if not any(result.benchmark == name for result in results)]
    summary = markdown(results, targets, missing)
    text = replaced(options.readme, summary)  # before anything is written
    try:
        (options.results / "summary.md").write_text(summary, encoding="utf-8")
        (options.results / "report.html").write_text(html_page(results, targets, missing), encoding="utf-8")
        options.readme.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{error.filename} cannot be written: {error.strerror}") from None
    for target in targets:
        print(f"{target.name:58}{target.target:>22}{target.measured:>26}  {target.state}")
    for name in missing:
        print(f"{name}: not measured")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    readme = RESULT_FOLDER.parent.parent / "README.md"
    parser.add_argument("--results", type=Path, default=RESULT_FOLDER, help="folder (benchmarks/results)")
    parser.add_argument("--readme", type=Path, default=readme, help="(README.md)")
    parser.add_argument("--compare", type=Path, metavar="OLD_FOLDER", help="results to compare with")
    options = parser.parse_args()
    try:
        run(options)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
