"""Whether a step of several processes has become slower: another checkout's beside this one's, in one run.

    git worktree add ../before COMMIT
    python benchmarks/scale_beside.py ../before [--processes 2] [--rounds N] [options of scale.py's networks]

Each checkout runs its own benchmarks/scale_process.py in a group of processes of its own, with one core each. They
work in turn, a short round each, and change which goes first, so that what else the machine does falls on both alike.
What counts is the quotient of the two rounds of a pair; a step takes as long as on the slowest process.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from command_line import Parser, check_device, positive
from scale import make_parser, settle
from scale_groups import HERE, PROGRAM, Group, write_data, write_recipe
from timing import quantiles

from kdav_fast.errors import InputError


def seconds_a_step(group: Group, count: int) -> float:
    """Mean over `count` steps of the slowest process's."""
    return max(map(statistics.mean, group.ask("steps", count=count)))


def measure(options: argparse.Namespace, folder: Path) -> list[tuple[float, float]]:
    """Seconds a step, there and here, of each round."""
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
            typical = seconds_a_step(group, 3)
        count = max(3, round(options.round_seconds / typical))
        pairs = []
        for number in range(options.rounds):
            order = (there, here) if number % 2 == 0 else (here, there)
            taken = {group: seconds_a_step(group, count) for group in order}
            pairs.append((taken[there], taken[here]))
            print(f"round {number + 1} of {options.rounds}", flush=True)
    return pairs


def tell(pairs: list[tuple[float, float]], world: int) -> None:
    there, here = (1e3 * quantiles(side)["median_s"] for side in zip(*pairs, strict=True))
    quotient = quantiles([now / before for before, now in pairs], "quotient")
    spread = f"{quotient['p20_quotient']:.3f} .. {quotient['p80_quotient']:.3f}"
    print(
        f"a step of {world} processes: {there:.1f} ms there, {here:.1f} ms here; "
        f"here over there {quotient['median_quotient']:.3f} ({spread})"
    )


def main() -> None:
    parser = make_parser(Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("tree", type=Path, help="the other checkout")
    parser.add_argument("--processes", type=positive(int), default=2, help="of each (%(default)s)")
    options = settle(parser.parse_args())
    try:
        check_device(options.device)
        options.tree = options.tree.resolve()
        if not (options.tree / PROGRAM).is_file() or options.tree == HERE:
            raise InputError(
                f"{options.tree} has no {PROGRAM}, or is this checkout; give another of kdav_fast"
            )
        with tempfile.TemporaryDirectory() as name:
            tell(measure(options, Path(name)), options.processes)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
