"""Predicts the time of forward + backward of every implementation on an H200, from counts of work, bytes and launches.

    python -m kdav_fast.kernels.cost [--json FILE]

A prediction, not a measurement: it is there to choose between designs where no GPU is at hand and to say where a
measured time is lost. An implementation is a list of passes (`Pass`), each as long as the slowest of its matrix work,
its bytes from L2 and its bytes from HBM, and what nothing hides. The device's time is their sum with the cost of
every launch; the host's is Python and its launches, which run ahead of the device. The longer of both is predicted,
and beside it the device's alone, which a CUDA graph leaves.

Units: FLOP, bytes, microseconds. B, d, L, K as in DESIGN section 2, and g = 2 B L d FLOP.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from kdav_fast.kernels.work import (
    FLOAT,
    H200,
    HALF,
    SHAPES,
    Machine,
    Pass,
    Shape,
    instruction_rate,
    product,
    rowwise,
)  # fmt: skip


def eager(shape: Shape) -> Iterator[Pass]:
    """The benchmark's eager loss: every operation of torch in bfloat16, each a pass over B x L."""
    b, d, n, k, ids = shape
    one = HALF * shape.pairs
    yield product("similarity", b, n, d, times=2)
    # Of B x L values read and written: two log_softmax (3), exp, subtract, multiply, sum; exp for the classes.
    for name, tensors, times in (
        ("log softmax", 3, 2), ("exp", 2, 2), ("subtract, multiply", 3, 2), ("sum", 1, 1),
    ):  # fmt: skip
        yield rowwise(name, tensors * one, 2 * one, times=times)
    if ids:
        yield rowwise("index_add", 3 * one, 2 * one)
        yield rowwise("index_select", 2 * one, 2 * one)
    else:
        yield product("class mass", b, k, n)
        yield product("class share", b, n, k)
    # Backward: the sum's expanded gradient times q, its negative, exp's, their sum, log_softmax's (read twice).
    for name, tensors in (
        ("multiply", 2),
        ("negate", 2),
        ("exp grad", 3),
        ("add", 3),
        ("log softmax grad", 5),
    ):
        yield rowwise(name, tensors * one, 2 * one)
    yield product("gradient", b, d, n)
    yield rowwise("small operations", FLOAT * b * (d + k), 0, times=40)


def compiled(shape: Shape) -> Iterator[Pass]:
    """The same through torch.compile: products by the library, everything between them fused, S and T kept."""
    b, d, n, k, ids = shape
    one = HALF * shape.pairs
    yield product("similarity", b, n, d, times=2)
    yield rowwise("maximum and sum", 2 * one, 2 * one, times=1, triton=True)
    yield rowwise("p, membership", 3 * one, 2 * one, triton=True)
    if ids:
        yield rowwise("index_add", 3 * one, 2 * one, triton=True)
    else:
        yield product("class mass", b, k, n)
        yield product("class share", b, n, k)
    share = 0 if ids else one
    yield rowwise("slopes: sum", 2 * one + share, 2 * one, triton=True)
    yield rowwise("slopes", 3 * one + share, 2 * one, triton=True)
    yield product("gradient", b, d, n)
    yield rowwise("small kernels", FLOAT * b * (d + k), 0, times=8, triton=True)


def chunked_64559d1(shape: Shape) -> Iterator[Pass]:
    """`chunked` at commit 64559d1: slices of any number of rows, similarities and class shares in float32.

    Slices were counted as in that commit's `bytes_per_row`. A leading dimension that is no multiple of 16 bytes makes
    the library take kernels for older GPUs at 1 / 3.5 of the rate (a published case), and scalar loads take twice as
    long (assumed: fewer bytes are under way).
    """
    b, d, n, k, ids = shape
    row = FLOAT * (2 * b + d + k) + 1
    rows = min(n, int(H200.l2_size / 2) // row)
    slices = math.ceil(n / rows)
    slow_product, slow_loads = (3.5, 2) if rows % 8 else (1, 1)

    def misaligned(one: Pass) -> Pass:
        return one._replace(slots=one.slots * slow_product)

    similarity = FLOAT * 2 * b * rows
    yield product("similarity", 2 * b, rows, d, out=FLOAT, times=slices)
    # S read twice and bfloat16 weights written.
    yield rowwise("absorb", 2.5 * similarity * slow_loads, 0, times=slices, triton=True)
    if ids:
        yield rowwise("one-hot", 4 * rows * k, 0, times=3 * slices)
    yield misaligned(product("class mass", b, k, rows, out=FLOAT, times=slices))
    yield misaligned(product("teacher mean", b, d, rows, out=FLOAT, times=slices))
    yield rowwise("rescale and add", 5 * FLOAT * b * (d + k) / 4, 0, times=4 * slices)
    yield rowwise("casts of queries", 6 * b * d, 0, times=2 * slices)
    yield product("similarity again", b, rows, d, out=FLOAT, times=slices)
    if ids:
        yield rowwise("share", 2 * FLOAT * b * rows, 0, times=2 * slices)
    else:
        yield product("class share", b, rows, k, out=FLOAT, times=slices)
        yield rowwise("offset, ratio to bfloat16", FLOAT * b * (2 * rows + 1.5 * k) / 2, 0, times=2 * slices)
    yield rowwise("slope", 2.5 * FLOAT * b * rows * slow_loads, 0, times=slices, triton=True)
    yield misaligned(product("gradient", b, d, rows, out=FLOAT, times=slices))
    yield rowwise("add", 3 * FLOAT * b * d, 0, times=slices)
    yield rowwise("filled - start", 0, 0, times=2 * slices)
    yield rowwise("small operations", FLOAT * b * (d + k), 0, times=50)


def chunked(shape: Shape, rows: int = 0) -> Iterator[Pass]:
    """`chunked_gpu`'s launches; `rows` of a slice instead of those that it takes."""
    b, d, n, k, ids = shape
    if not rows:
        fit = int(H200.l2_size * 3 / 4) // (2 * b * FLOAT + ids * HALF * k)
        rows = 1 << (max(256, min(4096, fit, n)).bit_length() - 1)
    slices = math.ceil(n / rows)
    memory = HALF * rows * d
    """Bytes of U that a slice reads, from HBM in either pass."""

    def with_memory(one: Pass) -> Pass:
        return one._replace(hbm=max(one.hbm, memory))

    yield with_memory(product("similarity", 2 * b, rows, d, out=FLOAT, times=slices))
    yield rowwise("absorb", 2 * b * rows * (FLOAT + HALF), 0, times=slices, triton=True)
    if ids:
        yield rowwise("one-hot", HALF * rows * k, 0, times=slices, triton=True)
    yield product("class mass", b, k, rows, out=FLOAT, add=True, times=slices)
    yield product("teacher mean", b, d, rows, out=FLOAT, add=True, times=slices)
    yield with_memory(product("similarity again", b, rows, d, out=FLOAT, times=slices))
    if not ids:
        yield product("class share", b, rows, k, out=FLOAT, times=slices)
    moved = b * rows * (FLOAT * (1 if ids else 2) + HALF)
    yield rowwise("slope", moved, 0, times=slices, triton=True)
    yield product("gradient", b, d, rows, out=FLOAT, add=True, times=slices)
    yield rowwise(
        "queries, divergences and their gradients", 3 * FLOAT * b * (d + k), 0, times=4, triton=True
    )
    yield rowwise("the loss of rows", 0, 0, times=10)


def fused_64559d1(shape: Shape) -> Iterator[Pass]:
    """`triton` at commit 64559d1: B x L never written; tiles of `tiles.TILES["sm_90"]` of that commit, in bfloat16.

    Every tile of the memory fetches those of x, y again; the pipeline runs empty at each; one program a multiprocessor.
    """
    b, d, n, k, ids = shape
    g, row_tiles = shape.g, math.ceil(b / 64)
    depth = HALF * d

    def fused(name: str, work: dict[int, float], tiles: int, fetched: float, drains: float) -> Pass:
        """`work` by instruction width; `tiles` of the memory in all programs, each fetching `fetched` bytes."""
        slots = sum(flops / instruction_rate(width) for width, flops in work.items())
        waves = tiles / H200.multiprocessors
        return Pass(
            name, sum(work.values()), slots, tiles * fetched, 0.0, waves * drains * H200.latency, 1, True
        )

    tiles = row_tiles * math.ceil(n / 128)
    yield fused("membership", {64: 2 * g}, tiles, (128 + 128) * depth, 1)
    items = 32 if ids else 64
    class_tiles = math.ceil(k / 512)
    tiles = row_tiles * class_tiles * math.ceil(n / items)
    class_bytes = 0 if ids else HALF * items * 512
    similarity = {16 if ids else 32: class_tiles * g}
    class_work = {256: 2.0 * shape.pairs * 512 * class_tiles}
    yield fused("classes", similarity | class_work, tiles, (64 + items) * depth + class_bytes, 1 + (not ids))
    yield rowwise("divergence", FLOAT * b * k * 36, 0, triton=True)._replace(unhidden=8.0)
    tiles = row_tiles * math.ceil(d / 512) * math.ceil(n / 32)
    # Ratios by class id come in sectors of 32 bytes.
    share_bytes = 32 * 64 * 32 if ids else HALF * (64 + 32) * k
    work = {16: 2 * g * math.ceil(d / 512) + (0 if ids else shape.class_work), 256: g}
    yield fused("gradient", work, tiles, (128 + 32 + 32) * depth + share_bytes, 2 + (not ids))
    yield rowwise("embedding gradient", FLOAT * b * d * 33, 0, triton=True)
    yield rowwise("small operations", FLOAT * b, 0, times=12)


def fused(shape: Shape, half_memory: bool = False) -> Iterator[Pass]:
    """`triton`: similarities kept in 16 bits, the vendor's products, one kernel between two of them.

    Class ids are sorted here: a counting sort.

    Args:
        half_memory: whether U is float16 already, as a training run keeps it; else it is copied to that.
    """
    b, d, n, k, ids = shape
    one = HALF * shape.pairs
    yield rowwise("unit rows", 2 * 2 * HALF * b * d, 0, triton=True)
    if not half_memory:
        yield rowwise("memory to float16", 2 * HALF * n * d, 2 * HALF * n * d)
    yield product("similarity", n, 2 * b, d)
    if ids:
        yield rowwise("class order", FLOAT * k * n / 256, 0, times=3, triton=True)._replace(
            unhidden=2 * H200.latency
        )
    sums = 3 * FLOAT * b * k if ids else 4 * FLOAT * b * math.ceil(n / 8 / max(1, n // 8 // 320)) + one
    # With class ids one load waits for another twice: where a class begins, its rows, their similarities.
    chain = 3 if ids else 1
    yield rowwise("membership", 2 * one + sums, 2 * one, triton=True)._replace(unhidden=chain * H200.latency)
    if not ids:
        yield product("class mass", k, b, n, out=FLOAT)
    parts = 3 * FLOAT * b * k if ids else sums - one + FLOAT * b * k
    yield rowwise("divergence", parts + 5 * HALF * b * k, 0, triton=True)._replace(unhidden=5 * H200.latency)
    if not ids:
        yield product("class share", n, b, k)
    yield rowwise("slopes", 4 * one, 3 * one, triton=True)._replace(unhidden=H200.latency)
    yield product("gradient", b, d, n, out=FLOAT)
    yield rowwise("embedding gradient", (2 * HALF + FLOAT) * b * d, 0, triton=True)
    yield rowwise("mean and its gradient", 0, 0, times=2)


def fused_half(shape: Shape) -> Iterator[Pass]:
    """`fused` with the memory as a training run keeps it."""
    return fused(shape, half_memory=True)


IMPLEMENTATIONS: dict[str, Callable[[Shape], Iterator[Pass]]] = {
    "eager bf16": eager,
    "torch.compile": compiled,
    "chunked": chunked,
    "chunked 64559d1": chunked_64559d1,
    "triton 64559d1": fused_64559d1,
    "triton": fused,
    "triton, U fp16": fused_half,
}
"""Name -> the passes of forward and backward with bfloat16 inputs and `filled` on the device."""


class Prediction(NamedTuple):
    """Of one implementation at one shape, in microseconds, FLOP and bytes."""

    total: float
    """The longer of both below."""
    device: float
    host: float
    launches: int
    flops: float
    l2: float
    hbm: float


def predict(name: str, shape: Shape, machine: Machine = H200) -> Prediction:
    """Forward and backward of `IMPLEMENTATIONS[name]`."""
    passes = list(IMPLEMENTATIONS[name](shape))
    device = sum(one.device_time(machine) for one in passes)
    host = machine.python + sum(one.host_time(machine) for one in passes)
    launches = sum(one.times for one in passes)
    counts = (sum(one.times * getattr(one, key) for one in passes) for key in ("flops", "l2", "hbm"))
    return Prediction(max(device, host), device, host, launches, *counts)


def table() -> list[dict[str, float | str]]:
    """One row an implementation and shape."""
    return [
        {"shape": label, "implementation": name} | predict(name, shape)._asdict()
        for label, shape in SHAPES.items()
        for name in IMPLEMENTATIONS
    ]


def show() -> None:
    """Prints the table and what it assumes."""
    print(
        "PREDICTED microseconds of forward + backward in bfloat16 on an H200 (kernels/cost.py); not measured"
    )
    print("assumed: " + ", ".join(f"{key} {value:g}" for key, value in H200._asdict().items()))
    heads = ("us", "device", "host", "launches", "GFLOP", "MB L2", "MB HBM")
    print(f"{'shape':14}{'implementation':18}" + "".join(f"{head:>10}" for head in heads))
    for row in table():
        numbers = [row[key] for key in ("total", "device", "host", "launches")]
        numbers += [row["flops"] / 1e9, row["l2"] / 1e6, row["hbm"] / 1e6]
        print(
            f"{row['shape']:14}{row['implementation']:18}" + "".join(f"{number:>10.0f}" for number in numbers)
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kdav_fast.kernels.cost", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()
    show()
    if options.json:
        options.json.write_text(
            json.dumps({"assumed": H200._asdict(), "predictions": table()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
