"""How fast image files are read and handed over beside a main thread that has other things to do.

    python benchmarks/reading.py [--root FOLDER] [--cores N] [--json FILE]

Ways to read batches of files from the system's cache, in another order each time:

- `loop`: one thread that does nothing else, into the same memory again and again: the machine's ceiling.
- `threads`: eight threads of this process, as the package had them until now (in this file).
- `process`: `kdav_fast.data.read_ahead`.

The same two also feed a DALI pipeline (`into DALI`), beside what DALI brings along: its external source with a process
of its own, and `fn.io.file.read`, which reads files in DALI's threads but knows neither tar shards nor rare formats,
and waits for ever for a named pipe. `decoded` goes on through DALI's CPU decoder, where reading is the lesser part.

The main thread is `idle`, or has work between two batches: it `launches` (small torch operations, each of which lets go
of the interpreter's lock, as starting a GPU's kernels does) or runs `python`. Undisturbed, that takes `--work-ms`,
which leaves room for 21,333 images/s. What it loses is what a batch takes beyond the same work without reading,
measured right before.

All are measured in turn, a short round each. Without `--root` the files are made, in a temporary folder.
"""

import argparse
import io
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from command_line import Parser, check_device, default_device, positive, result_files
from data_pipeline import DALI, open_set, pin, read_once
from environment import describe, version
from PIL import Image
from record import Record, failure
from timing import quantiles, warn_if_noisy, widest_spread

from kdav_fast.data.formats import for_dali
from kdav_fast.data.image_set import EncodedImages
from kdav_fast.data.preprocessing import RandomResizedCrop
from kdav_fast.data.read_ahead import read_ahead

AHEAD = 2  # batches, as in the loader
TARGET = 15_000
SIDES = (500, 375)
KIB = 110
MAIN = ("idle", "launches", "python")
Next = Callable[[], object]


class Way(NamedTuple):
    """One way to read."""

    start: Callable[[EncodedImages, Iterator[np.ndarray]], Next]
    """Returns what takes the next batch."""
    needs_dali: bool = False
    main: tuple[str, ...] = MAIN


def in_a_loop(images: EncodedImages, batches: Iterator[np.ndarray]) -> Next:
    buffer = memoryview(bytearray(2**20))

    def take() -> None:
        nonlocal buffer
        for path in images.places(next(batches)).paths:
            descriptor = os.open(path, os.O_RDONLY)
            size = os.fstat(descriptor).st_size
            if size > len(buffer):
                buffer = memoryview(bytearray(size))
            os.readv(descriptor, [buffer[:size]])
            os.close(descriptor)

    return take


def by_threads(images: EncodedImages, batches: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """As the package read until it had a process for it."""

    def read_part(positions: list[int]) -> list[np.ndarray]:
        return [for_dali(images.read(position)) for position in positions]

    pool, pending = ThreadPoolExecutor(8), deque()
    for batch in batches:
        pending.append([pool.submit(read_part, part.tolist()) for part in np.array_split(batch, 8)])
        if len(pending) > AHEAD:
            yield list(chain.from_iterable(part.result() for part in pending.popleft()))


def by_process(images: EncodedImages, batches: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    return read_ahead(batches, images, AHEAD)


Reading = Callable[[EncodedImages, Iterator[np.ndarray]], Iterator[list[np.ndarray]]]


def alone(reading: Reading) -> Way:
    return Way(lambda images, batches: reading(images, batches).__next__)


def into_dali(reading: Reading) -> Way:
    """To the operators of a pipeline, of which there is none but the question for sizes."""

    def start(images: EncodedImages, batches: Iterator[np.ndarray]) -> Next:
        from nvidia.dali import fn, types

        from kdav_fast.data.dali_graph import as_source

        first, batches = peek(batches)
        source = as_source(reading(images, batches), queue=2)
        options = {"ndim": 1, "dtype": types.UINT8, "no_copy": True}
        return pipeline(lambda: fn.external_source(source, **options).shape(), len(first))

    return Way(start, needs_dali=True)


def by_external_source(images: EncodedImages, batches: Iterator[np.ndarray]) -> Next:
    """Its process gets the same batches every time, since its source must be pickled."""
    from nvidia.dali import fn, types

    some = [images.places(batch).paths for batch in islice(batches, 16)]
    options = {"parallel": True, "batch": True, "prefetch_queue_depth": AHEAD + 2}
    source = PathReader(some)
    return pipeline(
        lambda: fn.external_source(source, ndim=1, dtype=types.UINT8, **options).shape(),
        len(some[0]),
        py_num_workers=1,
        py_start_method="spawn",
    )


class PathReader:
    """What DALI calls in its own process."""

    def __init__(self, paths: list[list[str]]) -> None:
        self._paths = paths

    def __call__(self, number: int) -> list[np.ndarray]:
        contents = []
        for path in self._paths[number % len(self._paths)]:
            descriptor = os.open(path, os.O_RDONLY)
            contents.append(np.empty(os.fstat(descriptor).st_size, np.uint8))
            os.readv(descriptor, [contents[-1]])
            os.close(descriptor)
        return contents


def by_file_operator(images: EncodedImages, batches: Iterator[np.ndarray]) -> Next:
    """Paths cross as one array, so that handing over does not grow with the batch."""
    from nvidia.dali import fn

    from kdav_fast.data.dali_graph import as_source

    def padded() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in batches:
            paths = np.array([os.fsencode(path) for path in images.places(batch).paths])
            lengths = np.char.str_len(paths).astype(np.int32)[:, None]
            yield paths.view(np.uint8).reshape(len(batch), -1), lengths

    first, batches = peek(batches)
    source = as_source(padded(), queue=2)

    def graph():
        paths, lengths = fn.external_source(source, num_outputs=2, no_copy=True)
        names = fn.slice(paths, 0, lengths, axes=[0], normalized_anchor=False, normalized_shape=False)
        return fn.io.file.read(names).shape()

    return pipeline(graph, len(first))


def decoded(reading: Reading) -> Way:
    """Squares of 224 pixels from random crops."""

    def start(images: EncodedImages, batches: Iterator[np.ndarray]) -> Next:
        from kdav_fast.data.cpu_decoder import CpuDecoder

        first, batches = peek(batches)
        crop = RandomResizedCrop((0.08, 1.0), (3 / 4, 4 / 3))
        threads = len(os.sched_getaffinity(0))
        options = {"batch_size": len(first), "threads": threads, "seed": 0, "checkpoint": None}
        return CpuDecoder(reading(images, batches), crop, 224, **options).__next__

    return Way(start, needs_dali=True, main=("idle",))


WAYS = {
    "loop": Way(in_a_loop, main=("idle",)),
    "threads": alone(by_threads),
    "process": alone(by_process),
    "threads into DALI": into_dali(by_threads),
    "process into DALI": into_dali(by_process),
    "DALI's external source, a process": Way(by_external_source, needs_dali=True),
    "DALI's fn.io.file.read": Way(by_file_operator, needs_dali=True),
    "threads, decoded": decoded(by_threads),
    "process, decoded": decoded(by_process),
}


def peek(batches: Iterator[np.ndarray]) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    first = next(batches)
    return first, chain([first], batches)


def pipeline(graph: Callable[[], object], batch_size: int, **options: object) -> Next:
    from nvidia.dali import Pipeline

    threads = len(os.sched_getaffinity(0))
    built = Pipeline(batch_size, threads, device_id=None, prefetch_queue_depth=2, **options)
    with built:
        built.set_outputs(graph())
    built.build()
    return built.run


def endless(images: int, batch_size: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    while True:
        order = random.permutation(images)
        yield from np.split(order[: images // batch_size * batch_size], images // batch_size)


def launch(count: int) -> None:
    tensor = torch.zeros(1)
    for _ in range(count):
        tensor.add_(1.0)


def compute(count: int) -> None:
    value = 0
    for number in range(count):
        value += number


WORK = {"launches": launch, "python": compute}


def units_in(work: Callable[[int], None], milliseconds: float, count: int = 5000) -> int:
    """How much work takes so long where nobody else works."""

    def seconds() -> float:
        begin = time.perf_counter()
        work(count)
        return time.perf_counter() - begin

    return round(milliseconds / 1e3 * count / min(seconds() for _ in range(200)))


def seconds_a_batch(work: Callable[[], None], take: Next, seconds: float) -> float:
    begin, batches, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < seconds:
        work()
        take()
        batches, elapsed = batches + 1, time.perf_counter() - begin
    return elapsed / batches


def run_round(take: Next, main: str, work: Callable[[], None], seconds: float) -> dict[str, float | None]:
    """One turn: seconds a batch, and what the main thread's work alone takes right before."""
    alone = None if main == "idle" else seconds_a_batch(work, lambda: None, seconds)
    seconds_a_batch(work, take, 0.1 * seconds)  # those that lay ready
    return {"batch_s": seconds_a_batch(work, take, seconds), "work_alone_s": alone}


def measure(images: EncodedImages, options: argparse.Namespace, record: Record) -> None:
    """Rounds of all in turn."""
    running: dict[str, Next] = {}
    for name, way in WAYS.items():
        if way.needs_dali and not version(DALI):
            continue
        try:
            running[name] = way.start(images, endless(len(images), options.batch_size))
            running[name]()
        except Exception as error:  # of one way: the others go on
            record.add({"way": name, "main": "idle", "error": failure(error)})
            running.pop(name, None)
    work = {"idle": lambda: None}
    for main, function in WORK.items():
        work[main] = partial(function, units_in(function, options.work_ms))
    print(f"{len(running)} ways of {len(WAYS)} are ready", flush=True)
    while (done := len(record.find(way="loop", main="idle"))) < options.rounds:
        rows = []
        for name, take in reversed(running.items()):  # the loop, which counts the rounds, is the last
            for main in WAYS[name].main:
                found = run_round(take, main, work[main], options.round_seconds)
                rate = options.batch_size / found["batch_s"]
                rows.append({"way": name, "main": main, "images_per_s": rate, **found})
        record.add(*rows)
        rates = ", ".join(f"{row['way']} ({row['main']}) {row['images_per_s']:.0f}" for row in rows)
        print(f"round {done + 1} of {options.rounds}: {rates} images/s", flush=True)


def summarise(rounds: list[dict]) -> dict[str, object]:
    """A row for each way and what the main thread did; the ratio of what is to what was."""
    rows = []
    for name, way in WAYS.items():
        for main in way.main:
            found = [
                one for one in rounds if (one["way"], one["main"]) == (name, main) and "error" not in one
            ]
            if found:
                rates = [one["images_per_s"] for one in found]
                rows.append({"way": name, "main": main, **quantiles(rates, "images_per_s")})
                if main != "idle":
                    alone = np.array([one["work_alone_s"] for one in found])
                    lost = np.array([one["batch_s"] for one in found]) - alone
                    rows[-1] |= {"work_alone_ms": 1e3 * np.median(alone), "lost_ms": 1e3 * np.median(lost)}
    by_name = {(row["way"], row["main"]): row for row in rows}

    def ratio(end: str, main: str) -> float | None:
        """Of the same round, then the median."""
        rates = [
            [one.get("images_per_s") for one in rounds if (one["way"], one["main"]) == (f"{way}{end}", main)]
            for way in ("process", "threads")
        ]
        quotients = [after / before for after, before in zip(*rates, strict=False) if after and before]
        return float(np.median(quotients)) if quotients else None

    busy = by_name.get(("process", "launches"), {})
    rate = busy.get("median_images_per_s")
    return {
        "rows": rows,
        "process_over_threads": {
            f"{main}{end}": ratio(end, main) for end in ("", " into DALI", ", decoded") for main in MAIN
        },
        "noise": widest_spread(rows, "images_per_s") if rows else None,
        "targets": [
            {
                "name": "files read beside a main thread that launches, images/s",
                "target": TARGET,
                "measured": rate,
                "met": rate and rate >= TARGET,
                "reason": rate and f"of {busy['work_alone_ms']:.1f} ms work, {busy['lost_ms']:.1f} lost",
            }
        ],
    }


def make_files(folder: Path, count: int) -> Path:
    """JPEG files of about 110 KiB: noise over a gradient, cut to size by its strength."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[: SIDES[1], : SIDES[0]]
    smooth = np.stack([x * 255 / SIDES[0], y * 255 / SIDES[1], (x + y) % 256], -1)
    contents = []
    for _ in range(24):
        noise = random.normal(0, 25, (SIDES[1], SIDES[0], 1))
        content = io.BytesIO()
        Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=92)
        contents.append(content.getvalue())
    for number in range(count):
        path = folder / "train" / str(number % 10) / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[number % len(contents)])
    return folder


def print_table(result: dict) -> None:
    print(f"{'way':36}{'main thread':12}{'images/s':>10}{'p20':>8}{'p80':>8}{'alone ms':>10}{'lost ms':>9}")
    for row in result["rows"]:
        rates = (row[f"{name}_images_per_s"] for name in ("median", "p20", "p80"))
        print("{:36}{:12}{:10.0f}{:8.0f}{:8.0f}".format(row["way"], row["main"], *rates), end="")
        print("{work_alone_ms:10.1f}{lost_ms:9.1f}".format(**row) if "lost_ms" in row else "")
    warn_if_noisy(result["noise"])


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, cores = positive(int), len(os.sched_getaffinity(0))
    add = parser.add_argument
    add("--root", type=Path, help="train/CLASS/IMAGE, or class folders (files are made)")
    add(
        "--device", choices=("cpu", "cuda"), default=default_device(), help="whose host this is (%(default)s)"
    )
    add("--images", type=count, default=2400, help="files (%(default)s)")
    add("--batch-size", type=count, default=256, help="images a batch (%(default)s)")
    add("--cores", type=int, default=cores, help="for all (%(default)s)")
    add("--work-ms", type=positive(float), default=12.0, help="of the main thread for a batch (%(default)s)")
    add("--rounds", type=count, default=9, help="of each way (%(default)s)")
    add("--round-seconds", type=positive(float), default=1.0, help="(%(default)s)")
    add("--json", type=Path, help="result (benchmarks/results/reading_DEVICE.json)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Raises InputError for what the user can mend."""
    device, options.plot = check_device(options.device), None
    path, _ = result_files(options, "reading")
    pin(options.cores)
    with ExitStack() as stack:
        if options.root is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            options.root = make_files(Path(folder), options.images)
        images = open_set(options.root, options.images)
        environment = describe(device, ("torch", DALI, "numpy")) | {"cores": options.cores}
        chosen = ("batch_size", "work_ms", "round_seconds")
        settings = {**read_once(images), **{name: getattr(options, name) for name in chosen}}
        record = Record(path, environment, settings, summarise, name="rounds")
        measure(images, options, record)
    print_table(record.write())


def main() -> None:
    make_parser().run(run)


if __name__ == "__main__":
    main()
