"""What follows from the students of benchmarks/method_accuracy.py: a row for each method, a table, a picture."""

import statistics
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

BASE = "none"
"""Labels only: beside it every method is judged."""
HEAD = [
    "method",
    "top-1 %",
    "deviation",
    "over labels only",
    "held-out top-1 %",
    "seeds",
    "learning rate",
    "minutes",
]


def summarize(tried: list[dict], trained: list[dict]) -> list[dict]:
    """A row a method, best mean first.

    Args:
        tried: the students that learning rates were chosen by.
        trained: those that count.
    """
    rates, runs = defaultdict(dict), defaultdict(list)
    for result in tried:
        rates[result["task"]["method"]][str(result["task"]["lr"])] = result["held_out_top1"]
    for result in sorted(trained, key=lambda result: result["task"]["seed"]):
        runs[result["task"]["method"]].append(result)
    rows = []
    for method, every in runs.items():
        values = [one["top1"] for one in every]
        rows.append(
            {
                "method": method,
                "settings": every[0]["task"]["distiller"],
                "lr": every[0]["task"]["lr"],
                "held_out_top1_by_lr": rates[method],
                "seeds": [one["task"]["seed"] for one in every],
                "top1": values,
                "mean_top1": statistics.mean(values),
                "std_top1": statistics.stdev(values) if len(values) > 1 else None,
                "held_out_top1": statistics.mean(one["held_out_top1"] for one in every),
                "minutes": statistics.mean(one["minutes"] for one in every),
                "curves": [one["curve"] for one in every],
            }
        )
    return sorted(rows, key=lambda row: -row["mean_top1"])


def cells(rows: list[dict]) -> list[list[str]]:
    """As tables show them; the columns are HEAD."""
    labels = next((row["mean_top1"] for row in rows if row["method"] == BASE), None)
    return [
        [
            row["method"],
            f"{row['mean_top1']:.2f}",
            "-" if row["std_top1"] is None else f"{row['std_top1']:.2f}",
            "-" if labels is None or row["method"] == BASE else f"{row['mean_top1'] - labels:+.2f}",
            f"{row['held_out_top1']:.2f}",
            str(len(row["seeds"])),
            f"{row['lr']:g}",
            f"{row['minutes']:.1f}",
        ]
        for row in rows
    ]


def trained_as(record: dict) -> str:
    """What was trained and on what, in a line."""
    networks, preset = record["networks"], record["preset"]
    student = networks["student"]
    images = "all" if preset["train_subset"] is None else f"{preset['train_subset']:,}"
    teacher = f"{networks['teacher']} ({record['teacher_top1']:.2f} %)"
    return (
        f"{teacher} teaches {student['name']} of width {student['width']:g}, "
        f"{images} training images, {preset['epochs']} epochs; {record['environment']['device']}"
    )


def print_table(record: dict) -> None:
    """One line a method."""
    table = Table(title=f"top-1 % on images that no student was trained on; {trained_as(record)}")
    for column in HEAD:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in cells(record["rows"]):
        table.add_row(*row)
    Console().print(table)


def plot(record: dict, path: Path) -> None:
    """Accuracy of every method, each seed a point, and against the minutes that it took."""
    import matplotlib.pyplot as plt

    rows, environment = record["rows"], record["environment"]
    figure, (bars, points) = plt.subplots(1, 2, figsize=(13, 1.5 + 0.3 * max(8, len(rows))))
    places = range(len(rows))
    bars.barh(
        places,
        [row["mean_top1"] for row in rows],
        color=["#D55E00" if row["method"] == "kdav" else "#0072B2" for row in rows],
    )
    for place, row in zip(places, rows, strict=True):
        bars.plot(row["top1"], [place] * len(row["top1"]), "k.", markersize=4)
        where = row["minutes"], row["mean_top1"]
        points.plot(*where, "o", color="#0072B2")
        points.annotate(row["method"], where, fontsize=8, xytext=(3, 3), textcoords="offset points")
    bars.set_yticks(places, [row["method"] for row in rows])
    bars.invert_yaxis()
    bars.set_xlim(left=max(0, min(min(row["top1"]) for row in rows) - 2))
    bars.set_xlabel("top-1 (%): mean, single seeds")
    points.set_xscale("log")
    points.set_xlabel("minutes of training" + ("" if "CPU" not in environment["device"] else " on one core"))
    points.set_ylabel("top-1 (%)")
    points.grid(alpha=0.3)
    figure.suptitle(f"{trained_as(record)}, torch {environment['versions']['torch']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
