"""The picture of `scale.py`."""

from pathlib import Path

from scale_model import PIECES

COLOURS = dict(zip(PIECES, ("#0072B2", "#E69F00", "#CC79A7", "#D55E00", "#999999"), strict=True))
SHARES_OF = "GPUs, class ids"


def plot(result: dict, path: Path) -> None:
    """Left: predicted and measured steps. Right: efficiency, over the share of each piece."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.6), layout="constrained")
    _bars(left, result)
    _efficiency(right, result)
    environment = result["environment"]
    figure.suptitle(
        f"Weak scaling: {environment['device']}, {environment['cores']} cores or GPUs, torch "
        f"{environment['versions']['torch']}; right: computed, not measured",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axis, result: dict) -> None:
    rows = result["rows"]
    places = range(len(rows))
    bottom = [0.0] * len(rows)
    for piece in PIECES:
        values = [1e3 * row["pieces_s"][piece] for row in rows]
        if any(values):
            axis.bar([p - 0.2 for p in places], values, 0.38, bottom, color=COLOURS[piece], label=piece)
            bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    measured = [1e3 * row["measured_s"] for row in rows]
    runs = [piece["run"] for piece in result["pieces"]]
    around = [
        [1e3 * (run["median_s"] - run["p20_s"]) for run in runs],
        [1e3 * (run["p80_s"] - run["median_s"]) for run in runs],
    ]
    axis.bar(
        [p + 0.2 for p in places], measured, 0.38, color="#444444", yerr=around, capsize=3, label="measured"
    )
    for place, row, top in zip(places, rows, bottom, strict=True):
        axis.annotate(
            f"{row['error_percent']:+.1f} %", (place - 0.2, top), ha="center", va="bottom", fontsize=9
        )
    axis.set_xticks(places, [f"{row['processes']}" for row in rows])
    axis.set_xlabel(
        "processes; left bar: predicted, with its error; right bar: measured, 20th to 80th percentile"
    )
    axis.set_ylabel("step (ms)")
    axis.margins(y=0.15)
    axis.legend(fontsize=9)


def _efficiency(axis, result: dict) -> None:
    lines = {}
    for row in result["curves"]:
        lines.setdefault(row["series"], []).append(row)
    shares = lines[SHARES_OF]
    worlds = [row["processes"] for row in shares]
    parts = [[100 * row["pieces_s"][piece] / row["step_s"] for row in shares] for piece in PIECES]
    axis.stackplot(worlds, parts, colors=COLOURS.values(), alpha=0.25)
    for (name, rows), style in zip(lines.items(), ("k:", "k-", "k--", "k-."), strict=False):
        label = f"{name} (areas: its pieces)" if name == SHARES_OF else name
        axis.plot(worlds, [100 * row["efficiency"] for row in rows], style, label=label)
    lowest = min(row["efficiency"] for row in shares)
    axis.set_ylim(max(0, 100 * lowest - 15), 100)
    axis.set_xscale("log", base=2)
    axis.set_xticks(worlds, [f"{n:,}" for n in worlds])
    axis.set_xlim(1, worlds[-1])
    axis.set_xlabel("processes, one a GPU or core")
    axis.set_ylabel("efficiency, share of the step (%)")
    axis.legend(fontsize=9, loc="lower left")
