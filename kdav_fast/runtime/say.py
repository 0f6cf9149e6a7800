"""Lines for the person who started a program."""

import os
from contextlib import suppress


def say(text: str) -> None:
    """Print a line. Whoever read it may be gone (a launcher, a terminal), which must not cost the run's state."""
    with suppress(OSError):
        print(text, flush=True)


def say_once(text: str) -> None:
    """The same, once for all processes of a launcher, before they know each other."""
    if os.environ.get("RANK", "0") == "0":
        say(text)
