"""A progress bar that fits its terminal: a readable bar, the time left, and as many whole figures as find room."""

import os
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

MIN_CELLS = 10
_UNKNOWN_WIDTH = 80


class ProgressBar(tqdm):
    """tqdm's bar on stderr, laid out anew at every refresh, hence after the terminal has changed its size.

    With `disable=None` there is none where stderr is no terminal, or one that cannot go back in its line.

    Args:
        as for tqdm.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        if options.get("disable") is None and os.environ.get("TERM") == "dumb":
            options["disable"] = True
        self._figures: list[str] = []
        super().__init__(*arguments, dynamic_ncols=True, **options)

    def show_figures(self, figures: Iterable[str]) -> None:
        """Figures to stand behind the bar, the most important first; they are never cut, the last are left out."""
        self._figures = list(figures)
        if not self.disable:
            self.refresh()

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm formats a line from, with the fullest layout that leaves the bar its cells."""
        values = super().format_dict
        if self.disable or values["total"] is None:
            return values
        if not values["ncols"] or values["ncols"] < 0:  # a terminal that does not know its size
            values["ncols"] = _UNKNOWN_WIDTH
        for layout in _layouts(self._figures):
            values["bar_format"] = layout
            rest = self.format_meter(**values | {"bar_format": layout.replace("{bar}", ""), "ncols": None})
            if len(rest) + MIN_CELLS <= values["ncols"]:
                break
        return values


def _layouts(figures: list[str]) -> list[str]:
    """tqdm's bar formats, from full to sparse."""
    escaped = [figure.replace("{", "{{").replace("}", "}}") for figure in figures]
    shortest = "{percentage:3.0f}%|{bar}| {remaining} left"
    counted = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}  {remaining} left"
    paced = counted if figures else counted + "  {rate_fmt}"
    described = [("{desc}" + layout) for layout in (paced, counted)]
    full = [
        described[0] + "".join(f"  {figure}" for figure in escaped[:many])
        for many in range(len(escaped), 0, -1)
    ]
    return [*full, *described, "{desc}" + shortest, shortest]
