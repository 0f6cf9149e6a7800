"""Methods that come with these tests alone, and together ask for everything that a method can ask for."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import kdav_fast.distillers

NAMES = ("everything", "taught")
"""Of the files in `added/`."""
_FOLDER = Path(__file__).parent / "added"

listeners: list[Callable[[str], None]] = []
"""Hear of each batch what it is taken for: "measure", "fit" or "train"."""


def reached(moment: str) -> None:
    """For the methods themselves."""
    for listener in listeners:
        listener(moment)


def add() -> None:
    """From now on they are among the methods there are, in this process."""
    kdav_fast.distillers.__path__.append(str(_FOLDER))


@contextmanager
def added():
    """They are, inside."""
    add()
    yield
    kdav_fast.distillers.__path__.remove(str(_FOLDER))
