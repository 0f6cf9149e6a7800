"""What is read from each benchmark's result file: the tables that are shown."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import method_accuracy_results
import method_cost_results

from kdav_fast.errors import InputError, one_line

LARGE = ("B256 d512 L65536", "B256 d512 L16384", "B1024 d2048 L65536")
"""Shapes of the loss that the short summary shows."""


VERDICTS = {True: "met", "yes": "met", False: "missed", "no": "missed", None: "not measured"}
"""What a result's target may say under `met`."""


@dataclass(frozen=True)
class Table:
    title: str
    head: list[str]
    rows: list[list[str]]
    short: bool = True
    """Whether `docs/benchmarks.md` shows it too."""


@dataclass(frozen=True)
class Result:
    """One result file."""

    name: str
    """Of the file."""
    benchmark: str
    device: str
    """cpu, cuda, or what else the file's name ends with."""
    data: dict[str, Any]
    tables: list[Table]
    picture: Path | None

    @property
    def environment(self) -> dict[str, Any]:
        return self.data["environment"]


def number(value: float | None) -> str:
    """Three digits or more; a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"


def _rates(rows: list[dict], label: str, first: str) -> list[list[str]]:
    """Label, rate, percentiles, and the ratio to a row whose label begins with `first`, else to the first row."""
    if not rows:
        return []
    base = next((row for row in rows if row[label].startswith(first)), rows[0])["median_images_per_s"]
    keys = ("median_images_per_s", "p20_images_per_s", "p80_images_per_s")
    return [
        [row[label], *(number(row[key]) for key in keys), number(row["median_images_per_s"] / base)]
        for row in rows
    ]


def _loss_kernel(data: dict) -> list[Table]:
    head = ["shape", "implementation", "ms", "20 %", "80 %", "x eager fp32", "x roofline"]
    head += ["extra MiB", "gradient error"]
    full = [row for row in data["rows"] if row["pass"] == "full"]
    eager = {row["shape"]: row for row in full if row["implementation"] == "eager fp32"}

    def cells(row: dict) -> list[str]:
        if "error" in row:
            return [row["shape"], row["implementation"], row["error"], *[""] * 6]
        times = [number(1e3 * row[key]) for key in ("median_s", "p20_s", "p80_s")]
        base = eager.get(row["shape"], {}).get("median_s")
        speed = number(None if base is None else base / row["median_s"])
        figures = [speed, number(row["times_roofline"]), number(row["extra_mib"])]
        return [row["shape"], row["implementation"], *times, *figures, f"{row['gradient_error']:.1e}"]

    large = [cells(row) for row in full if row["shape"].startswith(LARGE)]
    other = [cells(row) for row in full if not row["shape"].startswith(LARGE)]
    tables = [Table("The loss, forward and backward", head, large)] if large else []
    return tables + ([Table("The loss, other shapes", head, other, short=False)] if other else [])


def _left_out(data: dict) -> list[Table]:
    """What could not be measured, and contenders whose speed means nothing."""
    rows = [[name, reason] for name, reason in (data.get("not_measured") or {}).items()]
    rows += [
        [row["contender"], f"trains otherwise: its first loss differs by {row['relative_difference']:.1e}"]
        for row in data.get("first_step") or []
        if not row.get("equal", True)
    ]
    return [Table("Not measured, or not to be compared", ["what", "why"], rows)] if rows else []


def _data_pipeline(data: dict) -> list[Table]:
    head = ["loader", "images/s", "20 %", "80 %", "ratio"]
    table = Table("Loading and augmenting images", head, _rates(data["rows"], "loader", "torchvision"))
    return [table, *_left_out(data)]


def _reading(data: dict) -> list[Table]:
    head = ["way", "main thread", "images/s", "20 %", "80 %", "work alone ms a batch", "lost ms"]
    keys = ("median_images_per_s", "p20_images_per_s", "p80_images_per_s", "work_alone_ms", "lost_ms")
    rows = [[row["way"], row["main"], *(number(row.get(key)) for key in keys)] for row in data["rows"]]
    return [Table("Reading files and handing them over", head, rows)]


def _training_step(data: dict) -> list[Table]:
    head = ["contender", "images/s", "20 %", "80 %", "ratio"]
    tables = [Table("Training steps", head, _rates(data["rows"], "contender", "reference"))]
    tables += _left_out(data)
    phases = data["breakdown_s"]
    if phases:
        names = list(dict.fromkeys(name for parts in phases.values() for name in parts))
        cells = [
            [who, *(number(None if parts.get(name) is None else 1e3 * parts[name]) for name in names)]
            for who, parts in phases.items()
        ]
        tables.append(Table("Where a step's time goes (ms)", ["contender", *names], cells, short=False))
    return tables


def _method_costs(data: dict) -> list[Table]:
    rows = [method_cost_results.cells(row) for row in data["rows"]]
    costs = Table("What every method costs beside KD", method_cost_results.HEAD, rows, short=False)
    return [costs, *_left_out(data)]


def _method_accuracy(data: dict) -> list[Table]:
    rows = method_accuracy_results.cells(data["rows"])
    return [Table("What every method reaches", method_accuracy_results.HEAD, rows, short=False)]


def _accuracy(data: dict) -> list[Table]:
    rows, every_setting = [], []
    for row in data["rows"]:
        settings, seeds = row["settings"], row["seeds"]
        if isinstance(settings, dict):
            settings = ", ".join(f"{key} {value}" for key, value in settings.items())
        every_setting.append([row["method"], str(settings)])
        count = len(seeds) if isinstance(seeds, list) else seeds
        held_out = "-" if row["held_out_top1"] is None else f"{row['held_out_top1']:.2f}"
        top1 = [f"{row['mean_top1']:.2f}", number(row["std_top1"]), held_out, number(row["minutes"])]
        rows.append([row["method"], number(count), *top1])
    head = ["method", "seeds", "top-1 %", "deviation", "held-out top-1 %", "minutes"]
    rows.append(["the teacher", "", f"{data['teacher_top1']:.2f}", "", "", ""])
    named = Table("Settings of the methods", ["method", "settings"], every_setting, short=False)
    return [Table("Accuracy", head, rows), named]


def _right(data: dict) -> list[Table]:
    """Of check.py and gpu_tests.py."""
    wrong = [row for row in data["rows"] if not row["right"]]
    counts = [[str(len(data["rows"])), str(len(data["rows"]) - len(wrong))]]
    named = [[row["what"], str(row.get("error") or row.get("said") or "wrong")] for row in wrong]
    tables = [Table("What was checked", ["checks", "right"], counts)]
    return tables + ([Table("What is wrong", ["check", "what it says"], named)] if named else [])


def _scale(data: dict) -> list[Table]:
    rows = []
    for row in data["rows"]:
        pieces = [number(1e3 * seconds) for name, seconds in row["pieces_s"].items() if name != "data"]
        whole = [number(1e3 * row[key]) for key in ("predicted_s", "measured_s")]
        error = f"{row['error_percent']:+.1f}"
        rows.append([str(row["processes"]), *pieces, *whole, error, number(row["images_per_s"])])
    if not rows:
        return []
    names = [f"{name} ms" for name in data["rows"][0]["pieces_s"] if name != "data"]
    head = ["processes", *names, "predicted ms", "measured ms", "error %", "images/s"]
    tables = [Table("A step of several processes: predicted and measured", head, rows)]
    shown = (1, 8, 64, 1024)
    lines: dict[str, dict[int, float]] = {}
    for row in data["curves"]:
        lines.setdefault(row["series"], {})[row["processes"]] = row["efficiency"]
    cells = [[name, *(f"{100 * line[n]:.1f}" for n in shown)] for name, line in lines.items()]
    title = "Efficiency in %, predicted from assumptions and not measured"
    return [*tables, Table(title, ["processes", *(f"{n:,}" for n in shown)], cells)]


RESULTS: dict[str, Callable[[dict], list[Table]]] = {
    "check": _right,
    "loss_kernel": _loss_kernel,
    "data_pipeline": _data_pipeline,
    "reading": _reading,
    "training_step": _training_step,
    "method_costs": _method_costs,
    "method_accuracy": _method_accuracy,
    "accuracy": _accuracy,
    "scale": _scale,
    "gpu_tests": _right,
}
ONLY_GPU = ("check", "gpu_tests")
"""Whose results a CPU does not need."""


def read_results(folder: Path) -> list[Result]:
    """The results in a folder, in the order of RESULTS; other files are passed over.

    Raises:
        InputError: there is no such folder, or a result is malformed.
    """
    if not folder.is_dir():
        raise InputError(f"the folder {folder} does not exist; give the folder that holds the results")
    found = []
    for benchmark in RESULTS:
        for path in sorted(folder.glob(f"{benchmark}_*.json")):
            found.append(_read(path, benchmark))
    return found


def malformed(name: str, benchmark: str, error: Exception) -> InputError:
    """In one line, for a file that is not what its benchmark writes."""
    reason = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)
    return InputError(
        f"{name} is not a result of {benchmark}.py ({reason}); run benchmarks/{benchmark}.py again"
    )


def _read(path: Path, benchmark: str) -> Result:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        environment = data["environment"]
        for key in ("device", "date", "versions", "command"):
            environment[key]
        tables = RESULTS[benchmark](data)
        for one in data.get("targets") or []:
            one["name"], one["target"], one["measured"]
            VERDICTS[one["met"]]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise malformed(path.name, benchmark, error) from None
    picture = path.with_suffix(".png")
    device = path.stem.removeprefix(f"{benchmark}_")
    return Result(path.name, benchmark, device, data, tables, picture if picture.is_file() else None)
