"""By how much two sets of results differ: the same benchmarks, run twice."""

import statistics
from typing import Any

from summary_results import Result
from timing import NOISE_LIMIT

LABELS = ("shape", "pass", "implementation", "loader", "contender", "method", "series", "processes")
"""Keys that say what a median is of."""


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


def speed_ratios(new: Result, old: Result) -> dict[str, tuple[float, float, float]]:
    """Old median, new median, and how many times as fast the new one is, of what both results hold."""
    before = {what: value for what, value in medians(old.data).items() if value}
    after = {what: value for what, value in medians(new.data).items() if value and what in before}
    return {
        what: (before[what], value, value / before[what] if "_per_s" in what else before[what] / value)
        for what, value in after.items()
    }


def compare(new: list[Result], old: list[Result]) -> str:
    """Every median's change; how much faster or slower each benchmark ran as a whole, which is the machine's doing or
    the whole program's; and whether medians are within 10 % of each other, as they are and with that taken out."""
    lines, drifts, changes, own = [], [], [], []
    earlier = {result.name: result for result in old}
    for result in (result for result in new if result.name in earlier):
        before = earlier[result.name]
        circumstances = {
            "device": [one.environment.get("device") for one in (result, before)],
            "settings": [one.data.get("settings") for one in (result, before)],
        }
        differing = [what for what, (a, b) in circumstances.items() if a != b]
        if differing:
            lines.append(f"{result.name}: not compared, other {' and '.join(differing)}")
            continue
        ratios = speed_ratios(result, before)
        for what, (was, now, _) in ratios.items():
            change = 100 * (now / was - 1)
            changes.append(abs(change))
            lines.append(f"{result.name}: {what}: {was:.4g} -> {now:.4g} ({change:+.1f} %)")
        if ratios:
            drift = statistics.median(ratio for *_, ratio in ratios.values())
            own += [100 * abs(ratio / drift - 1) for *_, ratio in ratios.values()]
            drifts.append(f"{result.name}: as a whole {100 * (drift - 1):+.1f} % in speed")
    if not changes:
        return "\n".join([*lines, "no median is in both folders: nothing to compare"])
    aside = f"that taken out, {_verdict(own)}"
    return "\n".join([*lines, *drifts, aside, _verdict(changes) + _doubt(changes)])


def _verdict(changes: list[float]) -> str:
    limit = 100 * NOISE_LIMIT
    beyond = sum(change > limit for change in changes)
    if not beyond:
        return (
            f"all {len(changes)} medians are within {limit:.0f} %: the largest change is {max(changes):.1f} %"
        )
    return f"{beyond} of {len(changes)} medians differ by more than {limit:.0f} %, the most by {max(changes):.1f} %"


def _doubt(changes: list[float]) -> str:
    noisy = max(changes) > 100 * NOISE_LIMIT
    return ": the code changed, or this machine is too noisy" if noisy else ""
