"""A run as a report sees it: what its folder holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kdav_fast.tracking.class_results import ClassResults, read_class_results
from kdav_fast.tracking.metrics_log import read_metrics


@dataclass(frozen=True)
class LoggedRun:
    """What a run has logged so far."""

    label: str
    lines: list[dict[str, Any]]
    config: str | None
    """As its file has it; None if it has none."""
    classes: ClassResults | None = None
    """Of the evaluation at its end; None before that."""

    @classmethod
    def read(cls, label: str, run_dir: Path) -> Self:
        """Raises `InputError` if the folder has no readable metrics."""
        config = run_dir / "config.yaml"
        text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None
        return cls(label, read_metrics(run_dir), text, read_class_results(run_dir))

    def series(self, key: str, axis: str) -> tuple[list[float], list[float]]:
        """Positions and values of `key`; a null, which is a value that was not finite, becomes NaN."""
        found = [(line[axis], line[key]) for line in self.lines if key in line]
        points = [(x, math.nan if y is None else y) for x, y in found if y is None or is_number(y)]
        return [x for x, _ in points], [y for _, y in points]


def is_number(value: Any) -> bool:
    """Whether JSON has a number there."""
    return isinstance(value, int | float) and not isinstance(value, bool)
