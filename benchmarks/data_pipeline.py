"""How many images a second the loaders deliver: the plain one, DALI, and DALI from memory.

    python benchmarks/data_pipeline.py --root FOLDER [--device cpu|cuda] [--cores N] [--json FILE] [--plot FILE]

All take the same images in the same order, cut, resize, flip and normalise them alike, and have the same cores.
They are measured in turn, a few seconds each, until each has been measured for `--seconds` and for 5 times the
set (an epoch). Three things keep a loader's work inside its own clock:

- Between two rounds nobody is asked for batches, so that every loader fills its queue and then stands still. The
  next round begins only when the process and its workers use no more processor time.
- The batches that lay ready are taken before the clock starts, and as many more as are made side by side.
- The clock starts and stops when a batch comes that was being waited for, and runs over a whole number of batches
  made side by side. What is half done when it stops was so when it started.

The paths of the set are repeated to one long epoch: a DataLoader's workers idle at an epoch's end, which a short
one would make look frequent. The files come from the system's cache: all are read once beforehand.

Every round is on the disk when it is over: the same command goes on from there. Where DALI is not installed, its
loaders are left out; one that fails is left out with the error's first line.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from command_line import Parser, check_device, default_device, draw, positive, result_files
from environment import describe, version
from PIL import features
from record import Record, failure, leave_if_broken
from timing import cpu_seconds, quantiles, wait_until_idle, warn_if_noisy, widest_spread

from kdav_fast.data.batch import Batch
from kdav_fast.data.epoch_loader import EpochLoader
from kdav_fast.data.preprocessing import (
    Preprocessing,
    RandomResizedCrop,
    pixel_preprocessing,
    resident_preprocessing,
)
from kdav_fast.data.resident import decode_once
from kdav_fast.data.sources.folder import ImageFolder, index_folder
from kdav_fast.data.torchvision_loader import TorchvisionLoader
from kdav_fast.errors import InputError

EPOCHS = 5
LONG_EPOCH = 2**17
DALI = "nvidia-dali-cuda130"
PACKAGES = ("torch", "torchvision", "pillow", DALI, "numpy")
PLAIN = "torchvision"
HARDWARE_LOADS = (0.12, 0.99)
"""Shares of a batch that a GPU's JPEG unit decodes, beside the package's own."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The pipeline's queue holds 2 batches and 1 that is being made, the decoder before it 1 that is resampled, 2 that are
# decoded and 1 that is being decoded; the files of 2 more have been read; 1 to settle.
DALI_READY = 10


class Round(NamedTuple):
    """What one loader did in one turn."""

    images: int
    seconds: float
    cpu_seconds: float


@dataclass
class Contender:
    """A loader at work."""

    batches: Iterator[Batch]
    """Without end."""
    ready: int
    """Most batches that can lie ready, in whole or in part, when a round begins."""
    side_by_side: int
    """Batches made at the same time."""
    start_up_s: float


class Plan(NamedTuple):
    """How a loader is built; `ready` and `side_by_side` as in `Contender`."""

    make: Callable[[], EpochLoader]
    ready: int
    side_by_side: int


def pin(cores: int) -> None:
    """Keep this process, its threads and what they start to the first `cores` cores it may use.

    Raises:
        InputError: there are not so many.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= cores <= len(allowed):
        raise InputError(
            f"--cores is {cores} but this process may use 1 to {len(allowed)}; give one of these"
        )
    for thread in Path("/proc/self/task").iterdir():  # importing NumPy has started some
        os.sched_setaffinity(int(thread.name), allowed[:cores])
    torch.set_num_threads(cores)


def open_set(root: Path, count: int) -> ImageFolder:
    """`count` images of `root/train/CLASS/` or `root/CLASS/`: evenly picked, or repeated where there are fewer.

    Raises:
        InputError: there are no images.
    """
    root = root.resolve()
    # index_folder wants a split below a root; class folders right in `root` make it the split.
    images = (
        index_folder(root, "train") if (root / "train").is_dir() else index_folder(root.parent, root.name)
    )
    found = len(images)
    return images.select(np.arange(count) * found // count if count < found else np.arange(count) % found)


def read_once(images: ImageFolder) -> dict[str, float]:
    """Bring the files into the system's cache; how many there are and how large."""
    _, distinct = np.unique(images.paths, return_index=True)
    try:
        sizes = [len(images.read(position)) for position in distinct]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}; repair or remove it") from None
    return {"images": len(images), "files": len(sizes), "mean_file_kib": float(np.mean(sizes)) / 2**10}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def start(name: str, plan: Plan, device: torch.device) -> Contender:
    """Build a loader and wait for its first batch."""
    print(f"starting {name}", flush=True)
    begin = time.perf_counter()
    batches = chain.from_iterable(repeat(plan.make()))
    next(batches)
    synchronize(device)
    seconds = time.perf_counter() - begin
    wait_until_idle()
    return Contender(batches, plan.ready, plan.side_by_side, seconds)


def plans(options: argparse.Namespace, images: ImageFolder, device: torch.device) -> dict[str, Plan]:
    """By name. The plain loader comes first: its workers are forks, which should not inherit DALI's threads."""
    view = Preprocessing(
        options.size,
        RandomResizedCrop(area=(0.08, 1.0), aspect_ratio=(3 / 4, 4 / 3)),
        flip=True,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        dtype=DTYPES[options.dtype],
    )
    cores = options.cores
    shared = {"batch_size": options.batch_size, "device": device, "workers": cores}
    long = images.select(np.arange(LONG_EPOCH) % len(images))
    decoders = ("cpu", "gpu") if device.type == "cuda" else ("cpu",)

    def dali(*what: object, **how: object) -> EpochLoader:
        from kdav_fast.data.dali import DaliLoader

        return DaliLoader(*what, **how, **shared)

    def resident() -> EpochLoader:
        decoder = dali(images, pixel_preprocessing(view), decode=decoders[-1], shuffle=False)
        kept = decode_once(decoder, device, local_world=1, progress=False)
        return dali(kept, resident_preprocessing(view), shuffle=True)

    # A DataLoader prefetches 2 batches a worker, and every worker makes a batch of its own.
    plain = partial(TorchvisionLoader, long, view, shuffle=True, **shared)
    listed = {PLAIN: Plan(plain, 2 * cores, cores)}
    for decode in decoders:
        make = partial(dali, long, view, decode=decode, shuffle=True)
        listed[f"dali {decode}"] = Plan(make, DALI_READY, 1)
    for load in HARDWARE_LOADS if device.type == "cuda" else ():
        make = partial(dali, long, view, decode="gpu", hw_decoder_load=load, shuffle=True)
        listed[f"dali gpu, hardware {load:.0%}"] = Plan(make, DALI_READY, 1)
    return listed | {"resident": Plan(resident, DALI_READY, 1)}


def run_round(contender: Contender, seconds: float, device: torch.device) -> Round:
    """One turn of at least `seconds`, after which the loader stands still."""
    for _ in islice(contender.batches, contender.ready + contender.side_by_side):
        pass
    synchronize(device)
    cpu, begin, images, elapsed = cpu_seconds(), time.perf_counter(), 0, 0.0
    while elapsed < seconds:
        images += sum(len(batch.images) for batch in islice(contender.batches, contender.side_by_side))
        elapsed = time.perf_counter() - begin
    synchronize(device)
    result = Round(images, time.perf_counter() - begin, cpu_seconds() - cpu)
    wait_until_idle()
    return result


def has_enough(name: str, options: argparse.Namespace, record: Record) -> bool:
    """Whether this one has been measured for as long as was asked, or cannot be measured."""
    rounds = record.find(loader=name)
    if any("error" in one for one in rounds):
        return True
    images, seconds = (sum(one[what] for one in rounds) for what in ("images", "seconds"))
    return seconds >= options.seconds and images >= EPOCHS * options.images


def measure(
    listed: dict[str, Plan], options: argparse.Namespace, device: torch.device, record: Record
) -> None:
    """A round of each as soon as it is started, then of all in turn until each has had enough."""
    torch.zeros(1, device=device)  # a GPU's own start belongs to none of them
    at_work: dict[str, Contender] = {}
    number = 0
    while waiting := [name for name in listed if not has_enough(name, options, record)]:
        number += 1
        for name in waiting:
            try:
                with record.attempt(name):
                    if name not in at_work:
                        at_work[name] = start(name, listed[name], device)
                    one = run_round(at_work[name], options.round_seconds, device)
            except Exception as error:  # whatever a library raises costs this loader only
                print(f"{name} failed: {failure(error)}", flush=True)
                record.add({"loader": name, "error": failure(error)})
                leave_if_broken(error)
                continue
            record.add({"loader": name, "start_up_s": at_work[name].start_up_s, **one._asdict()})
            print(f"round {number}: {name} {one.images / one.seconds:.0f} images/s", flush=True)


def summarise(rounds: list[dict], names: list[str]) -> dict[str, object]:
    """Rows, the ratios of the medians and the spread between rounds, of the loaders that were measured."""
    rows = {}
    for name in names:
        own = [one for one in rounds if one["loader"] == name]
        if not own or "error" in own[-1]:
            continue
        rates = [one["images"] / one["seconds"] for one in own]
        images, seconds, cpu = (sum(one[key] for one in own) for key in ("images", "seconds", "cpu_seconds"))
        rows[name] = {
            "loader": name,
            "start_up_s": own[0]["start_up_s"],
            **quantiles(rates, "images_per_s"),
            "cpu_ms_per_image": 1e3 * cpu / images,
            "busy_cores": cpu / seconds,
            "images": images,
            "seconds": seconds,
            "rounds_images_per_s": rates,
        }

    def ratio(name: str) -> float | None:
        if name not in rows or PLAIN not in rows:
            return None
        return rows[name]["median_images_per_s"] / rows[PLAIN]["median_images_per_s"]

    return {
        "rows": list(rows.values()),
        "not_measured": {one["loader"]: one["error"] for one in rounds if "error" in one},
        "ratio_dali_cpu_over_torchvision": ratio("dali cpu"),
        "ratio_dali_gpu_over_torchvision": ratio("dali gpu"),
        "ratio_resident_over_torchvision": ratio("resident"),
        "noise": widest_spread(list(rows.values()), "images_per_s"),
    }


def plot(result: dict, path: Path) -> None:
    """Images a second, with the spread between rounds, and the ratio to the first loader, the plain one."""
    import matplotlib.pyplot as plt

    rows, environment = result["rows"], result["environment"]
    medians = [row["median_images_per_s"] for row in rows]
    spread = [
        [row["median_images_per_s"] - row["p20_images_per_s"] for row in rows],
        [row["p80_images_per_s"] - row["median_images_per_s"] for row in rows],
    ]
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.55 * len(rows)))
    bars = axis.barh([row["loader"] for row in rows], medians, xerr=spread, capsize=3)
    labels = [f"{median:.0f} ({median / medians[0]:.2f} x)" for median in medians]
    axis.bar_label(bars, labels, padding=6)
    axis.margins(x=0.25)
    axis.invert_yaxis()
    axis.set_xlabel("images/s, lines: 20th to 80th percentile of the rounds")
    axis.set_title(
        f"{environment['device']}, {environment['cores']} cores, DALI and torchvision", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def print_table(result: dict) -> None:
    print(
        f"{'loader':12}{'images/s':>10}{'p20':>8}{'p80':>8}{'ratio':>8}{'CPU ms/image':>14}{'start-up s':>12}"
    )
    rows = result["rows"]
    for row in rows:
        print(
            f"{row['loader']:12}{row['median_images_per_s']:10.0f}{row['p20_images_per_s']:8.0f}"
            f"{row['p80_images_per_s']:8.0f}{row['median_images_per_s'] / rows[0]['median_images_per_s']:8.2f}"
            f"{row['cpu_ms_per_image']:14.2f}{row['start_up_s']:12.1f}"
        )
    for name, reason in result["not_measured"].items():
        print(f"{name:12}not measured: {reason}")
    warn_if_noisy(result["noise"])


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, seconds = positive(int), positive(float)
    cores = len(os.sched_getaffinity(0))
    add = parser.add_argument
    add(
        "--root",
        type=Path,
        required=True,
        help="data set with train/CLASS/IMAGE, or a folder of class folders",
    )
    add(
        "--device",
        choices=("cpu", "cuda"),
        default=default_device(),
        help="where batches are delivered (%(default)s)",
    )
    add("--images", type=count, default=2400, help="in an epoch, and kept by resident (%(default)s)")
    add("--batch-size", type=count, default=64, help="images a batch (%(default)s)")
    add("--size", type=count, default=224, help="side of the square in pixels (%(default)s)")
    add("--dtype", choices=tuple(DTYPES), default="fp32", help="of the channels_last output (%(default)s)")
    add("--cores", type=int, default=cores, help="for all loaders, each with as many workers (%(default)s)")
    add(
        "--seconds",
        type=seconds,
        default=20.0,
        help=f"that each loader is measured at least, and {EPOCHS} epochs at least (%(default)s)",
    )
    add("--round-seconds", type=seconds, default=3.0, help="of one loader's turn (%(default)s)")
    add("--json", type=Path, help="result (benchmarks/results/data_pipeline_DEVICE.json)")
    add("--plot", type=Path, help="picture (beside the result)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Raises InputError for what the user can mend."""
    device = check_device(options.device)
    path, picture = result_files(options, "data_pipeline")
    images = open_set(options.root, options.images)
    pin(options.cores)
    environment = describe(device, PACKAGES) | {"cores": options.cores}
    environment["pillow_libjpeg_turbo"] = features.version_feature("libjpeg_turbo")
    chosen = ("batch_size", "size", "dtype", "seconds", "round_seconds")
    settings = {**read_once(images), **{name: getattr(options, name) for name in chosen}}
    print(json.dumps({"environment": environment, "settings": settings}, indent=1), flush=True)
    listed = plans(options, images, device)
    absent = [] if version(DALI) else [name for name in listed if name != PLAIN]
    lacking = dict.fromkeys(absent, "DALI is not installed")

    def derive(rounds: list[dict]) -> dict[str, object]:
        found = summarise(rounds, list(listed))
        return found | {"not_measured": found["not_measured"] | lacking}

    record = Record(path, environment, settings, derive, name="rounds")
    measure({name: plan for name, plan in listed.items() if name not in lacking}, options, device, record)
    result = record.write()
    if result["rows"]:
        draw(partial(plot, result, picture))
        print_table(result)


def main() -> None:
    make_parser().run(run)


if __name__ == "__main__":
    main()
