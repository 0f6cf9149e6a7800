"""What the benchmarks' command lines have in common."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from kdav_fast.errors import InputError

Result = TypeVar("Result")
RESULT_FOLDER = Path(__file__).resolve().parent / "results"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def run(self, function: Callable[[argparse.Namespace], Result], *, goes_on: bool = False) -> Result:
        """Read the command line and do what it says.

        Args:
            function: what is given the options; an `InputError` of it ends the program.
            goes_on: the same command goes on where it was interrupted.
        """
        options = self.parse_args()
        try:
            return function(options)
        except InputError as error:
            self.error(str(error))
        except KeyboardInterrupt:
            more = "; the same command goes on" if goes_on else ""
            self.exit(130, f"{self.prog}: interrupted{more}\n")


def positive(kind: type) -> Callable[[str], float]:
    """An argument's type: a number of that kind above 0."""

    def read(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    read.__name__ = f"{kind.__name__} above 0"  # argparse names it in its message
    return read


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> torch.device:
    """The device; raises InputError if it is not here."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda but torch finds no GPU; use --device cpu")
    return torch.device(name)


def result_files(options: argparse.Namespace, benchmark: str) -> tuple[Path, Path]:
    """Where the result and its picture go; raises InputError if a folder is missing, before anything is measured."""
    path = options.json or RESULT_FOLDER / f"{benchmark}_{options.device}.json"
    picture = options.plot or path.with_suffix(".png")
    for target in (path, picture):
        if not target.parent.is_dir():
            raise InputError(f"the folder {target.parent} does not exist; make it or write elsewhere")
    return path, picture


def draw(plot: Callable[[], object]) -> None:
    """Draw a result's picture, or say why there is none: figures do not depend on it."""
    try:
        plot()
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)
