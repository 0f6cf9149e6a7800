"""A program: `kdav distill CONFIG` for each config, where the methods of these tests are among those there are.

python added_run.py CONFIG... [at MOMENT NTH SIGNAL]

Each process gets the signal when it reaches the nth of these moments, SIGTERM the first process alone.
"""

import os
import signal
import sys

from kdav_fast.cli import main
from kdav_fast.train.folder import results
from tests.distillers import added_methods


def strike_at(moment: str, nth: int, number: int) -> None:
    """Send this process a signal."""
    left = nth

    def heard(reached: str) -> None:
        nonlocal left
        left -= reached == moment
        if left == 0 and reached == moment and (number == signal.SIGKILL or os.environ["RANK"] == "0"):
            os.kill(os.getpid(), number)

    added_methods.listeners.append(heard)


if __name__ == "__main__":
    configs = sys.argv[1:]
    added_methods.add()
    results.write_report = lambda *runs, **title: None  # curves take twice as long as such a run
    if "at" in configs:
        moment, nth, number = configs[-3:]
        strike_at(moment, int(nth), int(number))
        configs = configs[:-4]
    sys.exit(next(filter(None, (main(["distill", config]) for config in configs)), 0))
