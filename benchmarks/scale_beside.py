"""Whether a step of several processes has become slower: another checkout's beside this one's, in one run.

    git worktree add ../before COMMIT
    python benchmarks/scale_beside.py ../before [--processes 2] [--rounds N] [options of scale.py's networks]

Each checkout runs its own benchmarks/scale_process.py in a group of processes of its own, with one core each. They
work in turn, a short round each, and change which goes first, so that what else the machine does falls on both alike.
What counts is the quotient of the two rounds of a pair; a step takes as long as on the slowest process. The processor's
time tells of a CPU that others use too what the clock does not.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

from command_line import Parser, check_device, positive
from scale import make_parser, settle
from scale_groups import PROGRAM, Group, write_data, write_recipe
from timing import quantiles

from kdav_fast.errors import InputError


class Spent(NamedTuple):
    """Seconds a step."""

    wall: float
    """Of the slowest process, by the clock."""
    cpu: float
    """Of the processor, of all processes."""


def take_round(group: Group, count: int) -> Spent:
    """Means over `count` steps."""
    before = group.cpu_seconds()
    wall = max(map(statistics.mean, group.ask("steps", count=count)))
    return Spent(wall, (group.cpu_seconds() - before) / count)


def measure(options: argparse.Namespace, folder: Path) -> list[tuple[Spent, Spent]]:
    """Pairs of rounds, there and here."""
    world = options.processes
    write_data(folder, options.classes, options.image_size)
    write_recipe(folder, options)
    with (
        Group(world, True, options, folder, options.tree) as there,
        Group(world, True, options, folder) as here,
    ):
        for group in (there, here):  # both have been starting
            group.wait_until_ready()
        for group in (there, here):  # the first steps allocate, and fill the memory
            typical = take_round(group, 3).wall
        count = max(3, round(options.round_seconds / typical))
        pairs = []
        for number in range(options.rounds):
            order = (there, here) if number % 2 == 0 else (here, there)
            taken = {group: take_round(group, count) for group in order}
            pairs.append((taken[there], taken[here]))
            print(f"round {number + 1} of {options.rounds}", flush=True)
    return pairs


def tell(pairs: list[tuple[Spent, Spent]]) -> None:
    print(f"{'a step':12}{'there ms':>10}{'here ms':>10}{'here over there':>26}")
    for what in Spent._fields:
        sides = [[getattr(spent, what) for spent in side] for side in zip(*pairs, strict=True)]
        there, here = (1e3 * quantiles(side)["median_s"] for side in sides)
        q = quantiles([now / before for before, now in zip(*sides, strict=True)], "quotient")
        shown = f"{q['median_quotient']:.3f} ({q['p20_quotient']:.3f} .. {q['p80_quotient']:.3f})"
        print(f"{what:12}{there:10.1f}{here:10.1f}{shown:>26}")


def main() -> None:
    parser = make_parser(Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("tree", type=Path, help="the other checkout")
    parser.add_argument("--processes", type=positive(int), default=2, help="of each (%(default)s)")
    options = settle(parser.parse_args())
    try:
        check_device(options.device)
        options.tree = options.tree.resolve()
        if not (options.tree / PROGRAM).is_file():
            raise InputError(f"{options.tree} has no {PROGRAM}; give a checkout of kdav_fast")
        with tempfile.TemporaryDirectory() as name:
            tell(measure(options, Path(name)))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
