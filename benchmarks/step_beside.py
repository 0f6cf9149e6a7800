"""Whether kdav_fast has become slower: the training step of another checkout beside this one's, in one run.

    git worktree add ../before COMMIT
    python benchmarks/step_beside.py ../before [--rounds N] [--contenders NAME ...] [options of training_step.py]

Either checkout runs its own benchmarks/step_contenders.py in a process of its own, on the same files and from the same
weights; their first losses must be equal. They work in turn, a short round each, and change which goes first, so that
what else the machine does falls on both alike. What counts is the quotient of the two rounds of a pair. The
processor's time tells of a CPU that others use too what the clock does not; it includes the loader's.
"""

import argparse
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from json import loads
from pathlib import Path
from typing import Any, Self

from command_line import Parser, positive
from step_contenders import CEILING, CONTENDERS, FULL, REFERENCES, SLOW
from step_images import make_photographs
from step_results import ALLOWED
from timing import quantiles
from training_step import PRESETS
from training_step import make_parser as make_step_parser

from kdav_fast.errors import InputError

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "step_beside_process.py"
OWN = tuple(name for name in CONTENDERS if name not in REFERENCES)


class Side:
    """A checkout's process. As a context manager, it ends it."""

    def __init__(self, tree: Path, names: list[str], arguments: list[str]) -> None:
        self.tree = tree
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        command = [sys.executable, str(PROGRAM), str(tree), ",".join(names), *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, text=True, **pipes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def ask(self, contender: str) -> dict[str, float]:
        """Seconds a step of one round, by the clock ("wall") and of the processor ("cpu")."""
        with suppress(BrokenPipeError):
            self._process.stdin.write(contender + "\n")
            self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """The next one; raises InputError if there is none."""
        line = next((line for line in self._process.stdout if line.startswith("@")), None)
        if line is not None:
            return loads(line[1:])
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines() or ["it said nothing"]
        raise InputError(f"the process of {self.tree} ended: {said[-1]}")


def check_losses(before: dict[str, float], now: dict[str, float]) -> None:
    """Raises AssertionError if the two checkouts do not train the same, which makes their speeds meaningless."""
    for name, loss in before.items():
        if not abs(now[name] - loss) <= ALLOWED * abs(loss):
            raise AssertionError(
                f"{name} has loss {loss:.6f} there and {now[name]:.6f} here on the first batch"
            )


def compare(before: list[dict[str, float]], now: list[dict[str, float]], what: str) -> dict[str, float]:
    """Median, p20 and p80 of the quotients of paired rounds, now over before."""
    return quantiles([b[what] / a[what] for a, b in zip(before, now, strict=True)], "quotient")


def measure(options: argparse.Namespace, arguments: list[str]) -> None:
    """Measure and print; raises InputError for what the user can mend."""
    here, there = HERE.parent, options.tree.resolve()
    if not (there / "benchmarks" / "step_contenders.py").is_file():
        raise InputError(f"{options.tree} has no benchmarks/step_contenders.py; give a checkout of kdav_fast")
    with ExitStack() as stack:
        if options.root is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="step_beside_")))
            count = options.images or PRESETS[options.device]["images"]
            arguments = [*arguments, f"--root={make_photographs(folder / 'files', count)}"]
        sides = [stack.enter_context(Side(tree, options.contenders, arguments)) for tree in (there, here)]
        check_losses(*(side.answer() for side in sides))
        rounds = {name: ([], []) for name in options.contenders}
        for number in range(options.rounds):
            for name, taken in rounds.items():
                for place in (0, 1) if number % 2 == 0 else (1, 0):
                    taken[place].append(sides[place].ask(name))
            print(f"round {number + 1} of {options.rounds}", flush=True)
    print(f"{'step, here over there':28}{'there ms':>10}{'here ms':>10}{'wall':>24}{'processor':>24}")
    for name, taken in rounds.items():
        steps = [1e3 * quantiles([one["wall"] for one in side])["median_s"] for side in taken]
        told = [compare(*taken, what) for what in ("wall", "cpu")]
        shown = [
            f"{t['median_quotient']:.3f} ({t['p20_quotient']:.3f} .. {t['p80_quotient']:.3f})" for t in told
        ]
        print(f"{name:28}{steps[0]:10.1f}{steps[1]:10.1f}{shown[0]:>24}{shown[1]:>24}")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=positive(int), default=12, help="of each contender (%(default)s)")
    parser.add_argument("--contenders", nargs="+", choices=OWN, default=[SLOW, FULL, CEILING], metavar="NAME")
    own, arguments = parser.parse_known_args()
    options = make_step_parser().parse_args(arguments, own)
    try:
        measure(options, arguments)
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


if __name__ == "__main__":
    main()
