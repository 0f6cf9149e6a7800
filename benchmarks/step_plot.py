"""The picture of benchmarks/training_step.py."""

from pathlib import Path

from step_contenders import CONTENDERS


def plot(result: dict, path: Path) -> None:
    """Images a second with the spread between rounds, and where a step's time goes."""
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if row["contender"] in CONTENDERS]
    medians = [row["median_images_per_s"] for row in rows]
    spread = [
        [row["median_images_per_s"] - row["p20_images_per_s"] for row in rows],
        [row["p80_images_per_s"] - row["median_images_per_s"] for row in rows],
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 1.8 + 0.5 * len(rows)))
    bars = left.barh([row["contender"] for row in rows], medians, xerr=spread, capsize=3)
    left.bar_label(bars, [f"{median:.0f} ({median / medians[0]:.2f} x)" for median in medians], padding=6)
    left.margins(x=0.3)
    left.invert_yaxis()
    left.set_xlabel("images/s, lines: 20th to 80th percentile of the rounds")

    phases = result["breakdown_s"]
    begins = dict.fromkeys(phases, 0.0)
    for name in dict.fromkeys(name for values in phases.values() for name in values):
        # None is what was not measured; between events and clock, a little less than nothing can remain.
        widths = [max(0.0, 1e3 * (values[name] or 0.0)) for values in phases.values()]
        if any(widths):
            right.barh(list(phases), widths, left=list(begins.values()), label=name)
        begins = {key: begin + width for (key, begin), width in zip(begins.items(), widths, strict=True)}
    if phases:
        right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        right.invert_yaxis()
    right.set_xlabel("ms a step, medians of the rounds")

    settings, environment = result["settings"], result["environment"]
    figure.suptitle(
        f"{settings['teacher']} teaches {settings['student']}, {settings['image_size']} px, batch "
        f"{settings['batch_size']}: {environment['device']}, {environment['cores']} cores",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
