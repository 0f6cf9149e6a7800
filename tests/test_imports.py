"""Which file imports which, read from the files themselves: what is imported inside a function counts as well."""

import ast
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LEVELS = (
    {"errors"},
    {"runtime"},
    {"kernels", "config", "checkpoint"},
    {"data", "models"},
    {"student", "tracking"},
    {"teachers"},
    {"distillers"},
    {"inference", "doctor"},
    {"train"},
    {"demo"},
    {"cli"},
)
"""A room imports rooms of lower levels only; rooms of one level know nothing of each other."""
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
LONGEST = 420
ONE_FILE_ON_PURPOSE = {
    "benchmarks/reference_train.py"
}  # all of training in plain PyTorch, to be read from its top


def _module(file: Path) -> str:
    place = file.relative_to(REPOSITORY).with_suffix("")
    parts = ("kdav_fast", *place.parts) if place.parts[0] == "kernels" else place.parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    _module(file): file for folder in ("kdav_fast", "kernels") for file in (REPOSITORY / folder).rglob("*.py")
}
"""Modules of the package and their files; `kernels/` is installed inside it."""
IN_ROOMS = FILES.keys() - {"kdav_fast", "kdav_fast.__main__"}


@cache
def imports(module: str, types_too: bool = True) -> frozenset[str]:
    """Modules that one imports; `types_too`: also where only type checkers look."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and _is_type_checking(node.test)]
    left_out = set() if types_too else {id(node) for block in for_types for node in ast.walk(block)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    return frozenset(found)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test).endswith("TYPE_CHECKING")


def room(module: str) -> str:
    return module.split(".")[1]


def packages(module: str) -> set[str]:
    """Top-level packages that are neither ours nor Python's."""
    names = {name.split(".")[0] for name in imports(module)}
    return names - {"kdav_fast"} - sys.stdlib_module_names


def test_rooms_import_downwards():
    arrows = {(module, other) for module in IN_ROOMS for other in imports(module) & IN_ROOMS}
    upward = [
        f"{module} imports {other}"
        for module, other in arrows
        if room(other) != room(module) and LEVEL[room(other)] >= LEVEL[room(module)]
    ]
    assert sorted(upward) == []


def test_no_files_import_each_other_in_a_circle():
    """What only type checkers import is left out: a method's interface and its phases name each other's types."""
    graph = {module: imports(module, types_too=False) & FILES.keys() for module in FILES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_package_s_top_holds_what_is_run_and_nothing_loose():
    top = {path.stem for path in (REPOSITORY / "kdav_fast").glob("*.py")}
    assert top == {"__init__", "__main__", "cli", "demo", "errors"}
    assert {room(module) for module in IN_ROOMS} == LEVEL.keys()


def test_kernels_need_torch_and_triton_only():
    kernels = {module for module in IN_ROOMS if room(module) == "kernels"}
    assert {package for module in kernels for package in packages(module)} == {"torch", "triton"}


@pytest.mark.parametrize(
    ("package", "files"),
    [
        # Of the two in train/, one runs it and one holds a user's settings against its schema.
        ("deepspeed", {"train.engine.engine", "train.engine.file"}),
        (
            "nvidia",
            {"data.dali", "data.dali_draws", "data.dali_graph", "data.cpu_decoder", "doctor.decoding"},
        ),
    ],
)
def test_few_files_know_of_a_package(package, files):
    assert {module for module in FILES if package in packages(module)} == {
        f"kdav_fast.{each}" for each in files
    }


def test_files_are_short():
    folders = ("kdav_fast", "kernels", "launch", "benchmarks", "tests")
    lengths = {
        file.relative_to(REPOSITORY).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for file in (REPOSITORY / folder).rglob("*.py")
    }
    assert {file for file, length in lengths.items() if length > LONGEST} == ONE_FILE_ON_PURPOSE
