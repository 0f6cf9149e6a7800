"""What follows from the pairs of benchmarks/method_costs.py: a row for each method, a table, a picture."""

from pathlib import Path

from timing import quantiles, warn_if_noisy

BASE = "kd"
"""The method beside which all others are measured."""
MIB = 2**20


def summarise(measured: list[dict]) -> dict[str, object]:
    """All that follows from what was recorded: of each method its facts and its pairs, or an error."""
    errors = {one["method"]: one["error"] for one in measured if "error" in one}
    facts = {one["method"]: one for one in measured if "held_bytes" in one and one["method"] not in errors}
    pairs: dict[str, list[dict]] = {name: [] for name in facts}
    for one in measured:
        if "step_s" in one and one["method"] in pairs:
            pairs[one["method"]].append(one)
    rows = [make_row(facts[name], taken, facts.get(BASE)) for name, taken in pairs.items()]
    base = next((row for row in rows if row["method"] == BASE), None)
    noise = base["times_kd"]["p80_ratio"] - base["times_kd"]["p20_ratio"] if base else 0.0
    return {"rows": rows, "not_measured": errors, "noise": noise}


def make_row(facts: dict, pairs: list[dict], base: dict | None) -> dict[str, object]:
    """Time and memory of one method, and by how much they are more than KD's, of which `base` has the facts."""
    peak = facts["held_bytes"] + facts["step_bytes"]
    return {
        **facts,
        **quantiles([one["step_s"] for one in pairs], "step_s"),
        "over_kd": quantiles([one["step_s"] - one["kd_step_s"] for one in pairs]),
        "times_kd": quantiles([one["step_s"] / one["kd_step_s"] for one in pairs], "ratio"),
        "pairs": len(pairs),
        "peak_bytes": peak,
        "extra_bytes": base and peak - base["held_bytes"] - base["step_bytes"],
    }


def cells(row: dict) -> list[str]:
    """Of a row, as tables show it; the columns are HEAD."""
    times, on_imagenet = row["times_kd"], row["on_imagenet"]
    needed = ["refused"] * 2
    if "error" not in on_imagenet:
        needed = [_mib(on_imagenet["learned_bytes"]), _mib(on_imagenet["remembered_bytes"])]
    return [
        row["method"],
        str(row["views"]),
        row["before"] or "-",
        f"{1e3 * row['median_step_s']:.1f}",
        f"{1e3 * row['over_kd']['median_s']:+.1f}",
        f"{times['median_ratio']:.3f} ({times['p20_ratio']:.3f} to {times['p80_ratio']:.3f})",
        "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / MIB:+.1f}",
        _mib(row["learned_bytes"]),
        _mib(row["remembered_bytes"]),
        *needed,
    ]


HEAD = [
    "method",
    "views",
    "before",
    "step ms",
    "over KD's, ms",
    "times KD's (20 % to 80 %)",
    "memory over KD's, MiB",
    "learned MiB",
    "remembered MiB",
    "ImageNet: learned MiB",
    "ImageNet: remembered MiB",
]


def _mib(size: int) -> str:
    """A dash for nothing."""
    return "-" if size == 0 else f"{size / MIB:,.{2 if size < 10 * MIB else 0}f}"


def print_table(result: dict) -> None:
    warn_if_noisy(result["noise"])
    lines = [HEAD, *map(cells, result["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        first, *others = (
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join([first, *others]))
    for name, reason in result["not_measured"].items():
        print(f"{name}: not measured: {reason}")
    print(said_of(result))


def said_of(result: dict) -> str:
    """What was measured, in a line."""
    settings = result["settings"]
    return (
        f"{settings['teacher']} teaches {settings['student']}, {settings['image_size']} px, batch "
        f"{settings['batch_size']}, {settings['precision']}, {settings['images']:,} images of "
        f"{settings['classes']} classes; {result['environment']['device']}"
    )


def plot(result: dict, path: Path) -> None:
    """Step time as a multiple of KD's with its spread, and memory beyond KD's, a bar each method."""
    import matplotlib.pyplot as plt

    rows = sorted(result["rows"], key=lambda row: row["times_kd"]["median_ratio"])
    names = [f"{row['method']} ({row['views']} views)" if row["views"] > 1 else row["method"] for row in rows]
    low, times, high = (
        [row["times_kd"][f"{which}_ratio"] for row in rows] for which in ("p20", "median", "p80")
    )
    spread = [
        [m - lower for m, lower in zip(times, low, strict=True)],
        [h - m for m, h in zip(times, high, strict=True)],
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 1.5 + 0.27 * len(rows)), sharey=True)
    bars = left.barh(names, times, xerr=spread, capsize=2)
    left.bar_label(bars, [f"{value:.2f}" for value in times], padding=6, fontsize=8)
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xlabel("step time over KD's, lines: 20th to 80th percentile of the pairs")
    extra = [(row["extra_bytes"] or 0) / MIB for row in rows]
    bars = right.barh(names, extra, color="tab:orange")
    right.bar_label(bars, [f"{value:+.0f}" for value in extra], padding=4, fontsize=8)
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel("peak memory beyond KD's, MiB")
    for axis in (left, right):
        axis.margins(x=0.15)
    figure.suptitle(said_of(result), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
