"""How an evaluation went class by class: counted batch by batch, kept as `per_class.json`, printed worst first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdav_fast.errors import InputError
from kdav_fast.runtime.files import write_whole
from kdav_fast.runtime.json_text import json_text

if TYPE_CHECKING:  # a report reads results without waiting for torch
    from torch import Tensor

    from kdav_fast.runtime.processes import Cluster

FILE_NAME = "per_class.json"
_KEPT_PAIRS = 100


@dataclass(frozen=True)
class ClassResults:
    """What became of the images of each class, K of them."""

    names: tuple[str, ...]
    images: tuple[int, ...]
    """K counts."""
    first: tuple[int, ...]
    """Of those, how many had their class first."""
    among_five: tuple[int, ...]
    """Or among the first five."""
    confused: tuple[tuple[str, str, int], ...]
    """(class, class it was taken for, images), the most frequent pairs first."""

    def top1(self, number: int) -> float | None:
        """Percent of a class's images; None where there are none."""
        return _percent(self.first[number], self.images[number])

    def top5(self, number: int) -> float | None:
        return _percent(self.among_five[number], self.images[number])

    def worst_first(self) -> list[int]:
        """Class numbers by top-1, then by name; those without images last."""
        top1 = [self.top1(number) for number in range(len(self.names))]
        return sorted(range(len(self.names)), key=lambda n: (top1[n] is None, top1[n] or 0.0, self.names[n]))

    def as_json(self) -> dict[str, Any]:
        """As `per_class.json` and `kdav evaluate --json` have it, in the order of the logits."""
        return {
            "classes": [
                {"class": name, "images": self.images[n], "top1": self.top1(n), "top5": self.top5(n)}
                for n, name in enumerate(self.names)
            ],
            "confused": [{"class": a, "taken_for": b, "images": count} for a, b, count in self.confused],
        }

    def lines(self, pairs: int = 10) -> Iterator[str]:
        """A table for a terminal, worst first, then the most confused pairs."""
        width = max(map(len, (*self.names, "class")))
        yield f"{'class':{width}}  {'images':>7}  {'top-1 %':>8}  {'top-5 %':>8}"
        for n in self.worst_first():
            yield (
                f"{self.names[n]:{width}}  {self.images[n]:7,}  {in_percent(self.top1(n)):>8}  "
                f"{in_percent(self.top5(n)):>8}"
            )
        for name, other, count in self.confused[:pairs]:
            yield f"taken for another: {name} for {other}, {count:,} of {self.images[self.names.index(name)]:,}"


class ClassTally:
    """Counts the answers of an evaluation. Nothing is read from the device before `results`."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def update(self, logits: Tensor, target: Tensor, valid: Tensor) -> None:
        """Add a batch: B x K scores, B class ids, and which of the B rows count."""
        import torch

        from kdav_fast.models.outputs import best_classes

        best = best_classes(logits)
        among_five = (best == target[:, None]).any(1)
        self._rows.append(torch.stack([target, best[:, 0], among_five.long(), valid.long()]))

    def results(self, classes: tuple[str, ...], cluster: Cluster) -> ClassResults:
        """Of all ranks together; every rank must ask."""
        import torch

        rows = torch.cat(self._rows, dim=1).cpu().numpy() if self._rows else np.zeros((4, 0), np.int64)
        target, answer, among_five, valid = np.concatenate(cluster.gather(rows), axis=1)
        target, answer, among_five = (row[valid == 1] for row in (target, answer, among_five))
        count = lambda chosen: tuple(np.bincount(chosen, minlength=len(classes)).tolist())  # noqa: E731
        right, wrong = answer == target, (answer != target) & (answer >= 0)
        pairs, times = np.unique(np.stack([target[wrong], answer[wrong]]), axis=1, return_counts=True)
        order = np.argsort(-times, kind="stable")[:_KEPT_PAIRS]
        return ClassResults(
            classes,
            count(target),
            count(target[right]),
            count(target[among_five == 1]),
            tuple((classes[pairs[0, i]], classes[pairs[1, i]], int(times[i])) for i in order),
        )


def in_percent(value: float | None) -> str:
    """For a table; `-` where there is nothing to tell."""
    return "-" if value is None else f"{value:.2f}"


def write_class_results(run_dir: Path, results: ClassResults, step: int) -> None:
    """Write a run's `per_class.json`, whole or not at all; raises `OSError`."""
    write_whole(run_dir / FILE_NAME, json_text({"step": step, **results.as_json()}, indent=1) + "\n")


def read_class_results(run_dir: Path) -> ClassResults | None:
    """What `write_class_results` wrote; None if the run has no such file.

    Raises:
        InputError: it is damaged.
    """
    file = run_dir / FILE_NAME
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = [
            (row["class"], row["images"], row["top1"] or 0.0, row["top5"] or 0.0)
            for row in content["classes"]
        ]
        names, images, top1, top5 = zip(*rows, strict=True)
        return ClassResults(
            names,
            images,
            tuple(round(share * count / 100) for share, count in zip(top1, images, strict=True)),
            tuple(round(share * count / 100) for share, count in zip(top5, images, strict=True)),
            tuple((pair["class"], pair["taken_for"], pair["images"]) for pair in content["confused"]),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise InputError(f"{file} is damaged; remove it, the report does without") from None


def _percent(part: int, whole: int) -> float | None:
    return 100.0 * part / whole if whole else None
