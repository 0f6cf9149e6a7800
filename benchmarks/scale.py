"""How a training step scales: computed from measured pieces, checked by what can run here, then drawn to 1,024 GPUs.

    python benchmarks/scale.py [--device cpu|cuda] [--processes 1 2 4] [--json FILE] [--plot FILE]

Two groups of N processes take turns. In the first, each is a run of its own and sends nothing: its step is the
compute piece, with the cores shared as they are in the second, which is one run of N processes. There torch's
collectives are timed at several sizes; a ring's formula (`scale_model.py`) with the latency and bandwidth fitted to
them gives the time of each collective of a step. Predicted: the pieces' sum. Measured: the second group's steps.
A process has one core and one thread, as it would have one GPU; beyond the cores, several share one. The batch of a
process stays the same (weak scaling) and lies in memory.

What was measured at one number of processes is on the disk before the next: the same command goes on from there.

Of GPUs' networks nothing is measured here: what is assumed stands with its source in `scale_model.GpuCluster` and in
the result.
"""

import argparse
import json
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from command_line import RESULT_FOLDER, Parser, check_device, default_device, draw, positive, result_files
from environment import describe
from record import Record
from scale_curves import curves
from scale_groups import Group, write_data, write_recipe
from scale_model import GATHER, REDUCE, Point, fit_link, predict, ring_seconds, step_collectives
from scale_plot import plot
from timing import quantiles, warn_if_noisy, widest_spread

from kdav_fast.errors import InputError

SIZES = (4, 4096, 65536, 2**20)
"""Bytes of the timed collectives."""
CPU = {"teacher": "cifar:resnet32x4", "student": "cifar:resnet8x4", "classes": 100}
CPU |= {"image_size": 16, "batch_size": 16, "memory_length": 2048, "posterior": "dense", "precision": "fp32"}
CUDA = {"teacher": "torchvision:resnet34", "student": "torchvision:resnet18", "classes": 1000}
CUDA |= {
    "image_size": 224,
    "batch_size": 256,
    "memory_length": 16384,
    "posterior": "ids",
    "precision": "bf16",
}
PRESETS = {"cpu": CPU, "cuda": CUDA}


def by_core(times: list[list[float]], cores: int) -> float:
    """Seconds of a step of processes that compute alone, if all waited for the slowest core after each.

    A core's processes share it, so that its time for a step is the mean of theirs; rank r is on core r % cores.
    """
    slowest = []
    for step in zip(*times, strict=True):
        slowest.append(max(statistics.mean(step[core::cores]) for core in range(min(cores, len(step)))))
    return statistics.mean(slowest)


def measure_links(group: Group, world: int, gradients: int, rounds: int) -> list[dict[str, object]]:
    """Every collective at every size; a call takes as long as on its slowest process."""
    rows = []
    for kind, sizes in ((REDUCE, (*SIZES, gradients)), (GATHER, SIZES)):
        for size in sizes:
            count = max(4, min(40, 2**23 // size))
            calls = [group.ask("collective", kind=kind, size=size, count=count) for _ in range(rounds + 1)]
            # The first round allocates and connects.
            times = [statistics.median(map(max, zip(*ranks, strict=True))) for ranks in calls[1:]]
            rows.append({"kind": kind, "bytes": size, "processes": world, **quantiles(times)})
    return rows


def measure(world: int, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The pieces and the whole step at one number of processes."""
    cores = usable_cores(options.device)
    with Group(world, False, options, folder) as apart, Group(world, True, options, folder) as joined:
        for group in (apart, joined):  # both have been starting
            group.wait_until_ready()
        facts = joined.ask("facts")[0]
        calls = joined.ask("calls")[0]
        for group in (apart, joined):  # the first steps allocate, and fill the memory
            group.ask("steps", count=3)
        typical = statistics.median(map(statistics.median, apart.ask("steps", count=3)))
        count = max(3, round(options.round_seconds / typical))
        alone, together = [], []
        for number in range(options.rounds):
            alone.append(by_core(apart.ask("steps", count=count), cores))
            together.append(max(map(statistics.mean, joined.ask("steps", count=count))))
            print(
                f"{world} processes, round {number + 1}/{options.rounds}: a step takes {alone[-1] * 1e3:.1f} ms "
                f"alone, {together[-1] * 1e3:.1f} ms together",
                flush=True,
            )
        parts = {name: group.ask("parts", count=count) for name, group in (("alone", apart), ("run", joined))}
        rate = statistics.mean(apart.ask("loader", count=4))
        gradients = 4 * facts["parameters"]
        links = measure_links(joined, world, gradients, options.rounds) if world > 1 else []
    return {
        "processes": world,
        "facts": facts,
        "calls": calls,
        "steps_a_round": count,
        "alone": quantiles(alone) | {"rounds_s": alone},
        "run": quantiles(together) | {"rounds_s": together},
        "parts_s": {
            name: {part: statistics.mean(one[part] for one in ranks) for part in ranks[0]}
            for name, ranks in parts.items()
        },
        "loader_images_per_s": rate,
        "collectives": links,
    }


def compare(piece: dict[str, object]) -> dict[str, object]:
    """Predicted and measured step of one number of processes."""
    world, facts = piece["processes"], piece["facts"]
    links = {
        kind: fit_link(
            kind,
            [
                Point(p["bytes"], p["processes"], p["median_s"])
                for p in piece["collectives"]
                if p["kind"] == kind
            ],
        )
        for kind in (REDUCE, GATHER)
        if world > 1
    }
    expected = step_collectives(**facts) if world > 1 else []
    pieces = predict(
        piece["alone"]["median_s"],
        expected,
        lambda kind, size: ring_seconds(kind, size, world, links[kind]),
    )
    predicted, measured = sum(pieces.values()), piece["run"]["median_s"]
    return {
        "processes": world,
        "links": {kind: link._asdict() for kind, link in links.items()},
        "collectives": [one._asdict() for one in expected],
        "pieces_s": pieces,
        "predicted_s": predicted,
        "measured_s": measured,
        "error_percent": 100 * (predicted / measured - 1),
        "images_per_s": world * facts["batch"] / measured,
    }


def usable_cores(device: str) -> int:
    return len(os.sched_getaffinity(0)) if device == "cpu" else torch.cuda.device_count()


def print_table(result: dict[str, object]) -> None:
    drawn = {(row["series"], row["processes"]): row for row in result["curves"]}
    print(f"\n{'efficiency':44}" + "".join(f"{n:>8}" for n in (8, 64, 1024)))
    for name in dict.fromkeys(series for series, _ in drawn):
        row = [drawn[name, n]["efficiency"] for n in (8, 64, 1024)]
        print(f"{name:44}" + "".join(f"{value:8.1%}" for value in row))
    print(f"\n{'processes':>9}{'compute':>9}{'rows':>7}{'sums':>7}{'grads':>8}", end="")
    print(f"{'predicted':>11}{'measured':>10}{'error':>8}{'images/s':>10}")
    for row in result["rows"]:
        ms = {name: 1e3 * seconds for name, seconds in row["pieces_s"].items()}
        print(
            f"{row['processes']:9}{ms['compute']:9.1f}{ms['teacher rows']:7.2f}{ms['small sums']:7.2f}"
            f"{ms['gradients']:8.2f}{1e3 * row['predicted_s']:11.1f}{1e3 * row['measured_s']:10.1f}"
            f"{row['error_percent']:+7.1f}%{row['images_per_s']:10.1f}"
        )
    print("times of a step in ms; the curves beyond these are predictions, not measurements")
    warn_if_noisy(result["noise"])


def make_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """With what is trained, and for how long it is measured."""
    count, seconds = positive(int), positive(float)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default=default_device())
    add("--rounds", type=count, default=6, help="of each group, in turn (%(default)s)")
    add("--round-seconds", type=seconds, default=2.0, help="(%(default)s)")
    for name, value in CPU.items():
        kind = count if isinstance(value, int) else str
        add(f"--{name.replace('_', '-')}", type=kind, help=f"({value} on the CPU, {CUDA[name]} on a GPU)")
    return parser


def settle(options: argparse.Namespace) -> argparse.Namespace:
    """With the preset where nothing was given."""
    for name, value in PRESETS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def read_options() -> argparse.Namespace:
    parser = make_parser(Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    add, help_text = parser.add_argument, "(1 2 4; on GPUs those of which there are enough)"
    add("--processes", type=positive(int), nargs="+", help=help_text)
    add("--json", type=Path, help="result (benchmarks/results/scale_DEVICE.json)")
    add("--plot", type=Path, help="picture (beside the result)")
    options = settle(parser.parse_args())
    options.parser = parser
    return options


def run(options: argparse.Namespace) -> None:
    """Raises InputError for what the user can mend."""
    device = check_device(options.device)
    if options.processes is None:
        options.processes = [n for n in (1, 2, 4) if device.type == "cpu" or n <= usable_cores("cuda")]
    if device.type == "cuda" and max(options.processes) > usable_cores("cuda"):
        raise InputError(
            f"--processes asks for {max(options.processes)} but torch finds {usable_cores('cuda')} GPUs; ask for "
            "as many at most"
        )
    path, picture = result_files(options, "scale")
    environment = describe(device, ("torch", "deepspeed", "numpy")) | {"cores": usable_cores(options.device)}
    if device.type == "cpu":
        environment["threads"] = 1  # of each process
    settings = {name: getattr(options, name) for name in (*CPU, "processes", "rounds", "round_seconds")}
    print(json.dumps({"environment": environment, "settings": settings}, indent=1), flush=True)

    def derive(pieces: list[dict]) -> dict[str, Any]:
        if not pieces:
            return {"rows": []}
        rows = [compare(piece) for piece in pieces]
        drawn, assumptions = curves(pieces, rows, device.type, RESULT_FOLDER)
        noise = widest_spread([piece[name] for piece in pieces for name in ("alone", "run")])
        return {"rows": rows, "noise": noise, "assumptions": assumptions, "curves": drawn}

    record = Record(path, environment, settings, derive, name="pieces")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, options.classes, options.image_size)
        write_recipe(folder, options)
        for world in sorted(set(options.processes)):
            if not record.find(processes=world):
                record.add(measure(world, options, folder))
    result = record.write()
    draw(partial(plot, result, picture))
    print_table(result)


def main() -> None:
    options = read_options()
    try:
        run(options)
    except InputError as error:
        options.parser.error(str(error))


if __name__ == "__main__":
    main()
