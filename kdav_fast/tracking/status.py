"""What a person sees while a run trains: a bar on a terminal, plain lines anywhere else."""

import sys

from kdav_fast.runtime.processes import Cluster
from kdav_fast.runtime.progress_bar import ProgressBar
from kdav_fast.runtime.say import say

_ON_BAR = {
    "train/loss": "loss {:.4g}",
    "train/top1": "top-1 {:.1f} %",
    "images_per_second": "{:,.0f} images/s",
}
"""What stands behind the bar, the most important first; `metrics.jsonl` has the rest."""


class StatusLine:
    """Rank 0's view of the run; silent on the others.

    Args:
        cluster: the run's processes.
        step: optimizer steps already taken.
        steps: optimizer steps of the whole run.
    """

    def __init__(self, cluster: Cluster, step: int, steps: int) -> None:
        self._speaks = cluster.is_first
        self._steps = steps
        bar = ProgressBar(total=steps, initial=step, unit="step", disable=None) if self._speaks else None
        self._bar = None if bar is None or bar.disable else bar

    def advance(self) -> None:
        """One optimizer step is done."""
        if self._bar is not None:
            self._bar.update()

    def show(self, step: int, values: dict[str, float]) -> None:
        """The metrics of a logging interval or an evaluation."""
        if self._bar is not None and not any(name.startswith("val/") for name in values):
            self._bar.show_figures(
                words.format(values[name]) for name, words in _ON_BAR.items() if name in values
            )
        else:
            shown = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
            self.say(f"step {step}/{self._steps}  {shown}")

    def say(self, text: str) -> None:
        """A line of text that does not tear the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._speaks:
            say(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _short(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
