"""What the documentation names is there: files, sections, modules, code, and the figures of the README."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
PAGES = [README, REPOSITORY / "CHANGELOG.md", REPOSITORY / "launch" / "README.md", *DOCS]
EXAMPLES = sorted((REPOSITORY / "launch").glob("*.yaml"))


def relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def without_code(page: Path) -> str:
    return re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", without_code(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=relative)
def test_every_path_and_module_it_names_exists(page):
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"(?<![\w/.~-])(?:kdav_fast|kernels|launch|benchmarks|tests|docs)/[\w./-]*", text)
    missing = [path for path in paths if "NAME" not in path and not (REPOSITORY / path.rstrip(".")).exists()]
    modules = re.findall(r"(?<![\w/.])kdav_fast(?:\.[a-z]\w*)+", text)
    assert missing + [module for module in modules if find_spec(module) is None] == []


def test_every_page_is_in_the_index():
    index = REPOSITORY / "docs" / "README.md"
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", index.read_text(encoding="utf-8")))
    assert linked == {page.name for page in DOCS} - {index.name}


def test_the_readme_stays_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def test_the_readme_s_accuracies_are_those_measured():
    table = re.findall(r"(?m)^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|$", README.read_text(encoding="utf-8"))
    said = {name: (top1, deviation) for name, top1, deviation in table}
    results = json.loads((REPOSITORY / "benchmarks" / "results" / "accuracy_cpu.json").read_text())
    measured = {row["method"]: row for row in results["rows"]}
    assert len(said) == 4
    for name, figures in said.items():
        row = measured[re.sub(r".*\((\w+)\)", r"\1", name)]
        assert figures == (f"{row['mean_top1']:.2f}", f"{row['std_top1']:.2f}")
        assert len(row["seeds"]) == 3


def test_the_guide_to_a_method_quotes_the_code():
    guide = (REPOSITORY / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    quoted = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    files = ("kd.py", "terms/softened.py")
    code = "".join((REPOSITORY / "kdav_fast" / "distillers" / file).read_text("utf-8") for file in files)
    assert quoted
    assert all(block in code for block in quoted)
