"""All results on one page and in `docs/benchmarks.md`: what was measured, on what, and which targets are met.

    python benchmarks/summary.py [--results FOLDER] [--page FILE]
    python benchmarks/summary.py --compare OLD_FOLDER [--results FOLDER]

Reads the results of the other benchmarks, and writes `report.html`, which opens offline, and `summary.md` beside
them. The page's text between its two markers becomes that summary; in `methods.md` beside it, what stands between
others becomes the tables of what methods cost and of what they reach. A target without a result is shown as not
measured. With `--compare`, nothing is written: it prints by how much the medians that two folders share differ.
"""

import argparse
from pathlib import Path

from command_line import RESULT_FOLDER, Parser
from method_accuracy_results import trained_as
from method_cost_results import said_of
from summary_compare import compare
from summary_pages import html_page, markdown, table_markdown
from summary_results import ONLY_GPU, RESULTS, read_results
from summary_targets import all_targets

from kdav_fast.errors import InputError

METHODS = "methods.md"
"""Beside the page."""


def replaced(page: Path, summaries: dict[str, str]) -> str:
    """The page's text with each summary between the markers of its name; empty ones change nothing.

    Raises:
        InputError: it cannot be read, or markers are not there once each, in order.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--page {page}: {error.strerror}; give the page to update") from None
    for name, summary in summaries.items():
        if summary:
            text = _between(text, page, name, summary)
    return text


def _between(text: str, page: Path, name: str, summary: str) -> str:
    first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    begin, end = text.find(first), text.find(last)
    if not 0 <= begin < end or text.count(first) != 1 or text.count(last) != 1:
        raise InputError(
            f"{page} needs the lines '{first}' and '{last}' once each, in this order, around the place of the "
            "summary; add them"
        )
    return f"{text[: begin + len(first)]}\n{summary.strip()}\n{text[end:]}"


def run(options: argparse.Namespace) -> None:
    """Raises InputError for what the user can mend."""
    results = read_results(options.results)
    if options.compare is not None:
        print(compare(results, read_results(options.compare)))
        return
    targets = all_targets(results)
    measured = {result.benchmark for result in results}
    missing = [name for name in RESULTS if name not in measured and name not in ONLY_GPU]
    summary = markdown(results, targets, missing)
    pages = {options.page: replaced(options.page, {"benchmarks": summary})}  # before anything is written
    methods = options.page.with_name(METHODS)
    if methods.exists():
        pages[methods] = replaced(
            methods,
            {
                "costs": table_markdown(results, "method_costs", said_of),
                "reaches": table_markdown(results, "method_accuracy", trained_as),
            },
        )
    try:
        (options.results / "summary.md").write_text(summary, encoding="utf-8")
        (options.results / "report.html").write_text(html_page(results, targets, missing), encoding="utf-8")
        for page, text in pages.items():
            page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{error.filename} cannot be written: {error.strerror}") from None
    for target in targets:
        print(f"{target.name:58}{target.target:>22}{target.measured:>26}  {target.state}")
    for name in missing:
        print(f"{name}: not measured")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    page = RESULT_FOLDER.parent.parent / "docs" / "benchmarks.md"
    parser.add_argument("--results", type=Path, default=RESULT_FOLDER, help="folder (benchmarks/results)")
    parser.add_argument("--page", type=Path, default=page, help="Markdown (docs/benchmarks.md)")
    parser.add_argument("--compare", type=Path, metavar="OLD_FOLDER", help="results to compare with")
    parser.run(run)


if __name__ == "__main__":
    main()
