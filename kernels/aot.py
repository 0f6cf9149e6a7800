"""Compiles every Triton kernel that training launches, without a GPU, and reports what its machine code does.

    python -m kdav_fast.kernels.aot --targets sm_80,sm_90,sm_100 [--json FILE]

Exit codes: 0 all clean; 1 a kernel does not compile, spills, asks for more shared or tensor memory than the device
has, or loads from global memory less than 8 bytes a thread at a time where it could do better; 2 bad arguments.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdav_fast.kernels import cost, launches, triton_chunk
from kdav_fast.kernels.sass import report

# Bytes of shared memory that one block, and that all of a multiprocessor's, may ask for (CUDA programming guide,
# compute capabilities). A multiprocessor has 64 K registers and 2,048 threads in all three.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
TENSOR_MEMORY_COLUMNS = 512
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32


class Narrow(NamedTuple):
    """Loads of less than 8 bytes that a kernel means to have, in one thread's code."""

    once: int = 8
    """Outside loops: one value for a whole row of a tile."""
    in_loops: int = 0


NARROW: dict[str, Narrow] = {
    # Ratios by class id, 8 or 16 a thread.
    "chunked_slope_kernel ids": Narrow(once=20),
    # One row number of the class order each, of two rows in float32.
    "membership_kernel ids": Narrow(in_loops=2),
    # Class ids, one a thread.
    "class_order_kernel": Narrow(once=16, in_loops=12),
    # Logits, 16 a thread three times: the rows of K values may start anywhere.
    "divergence_kernel": Narrow(once=24, in_loops=48),
}
"""By kernel, or kernel and kind of posterior. Not asked of shapes that are odd, whose rows start anywhere."""


class Job(NamedTuple):
    """One kernel as launched, for one target."""

    target: str
    variant: str
    launch: launches.Launch


def compile_job(job: Job) -> dict[str, Any]:
    """Compiles one job; returns its row of the table, with `problem` empty where it is clean."""
    launch = job.launch
    row: dict[str, Any] = {
        "target": job.target,
        "kernel": launch.kernel,
        "variant": job.variant,
        "problem": "",
    }
    source = ASTSource(
        fn=getattr(importlib.import_module(launch.module), launch.kernel),
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(place,): [["tt.divisibility", 16]] for place in launch.divisible},
    )
    target = GPUTarget("cuda", int(job.target.removeprefix("sm_")), 32)
    try:
        compiled = triton.compile(source, target=target, options=dict(launch.options))
    except Exception as error:  # whatever a compiler pass raises is this row's result
        message = " ".join(str(error).split())[-300:]  # the reason comes last, after the source
        return row | {"problem": f"does not compile: {type(error).__name__}: {message}"}
    return row | inspect_binary(job.target, compiled)


def inspect_binary(target: str, compiled: Any) -> dict[str, Any]:
    """Registers, memory, loads and matrix instructions of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [tool, "-res-usage", "-sass", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")
    )
    shared, threads = compiled.metadata.shared, 32 * compiled.metadata.num_warps
    row = {
        "registers": registers,
        "shared_bytes": shared,
        "spill_bytes": stack + local,
        "tensor_memory_columns": getattr(compiled.metadata, "tmem_size", 0) or 0,
        "programs": programs(target, registers, threads, shared),
    }
    return row | report(text)._asdict()


def programs(target: str, registers: int, threads: int, shared: int) -> int:
    """How many programs a multiprocessor holds at a time; registers are dealt in eights a thread."""
    fit = min(PROGRAMS, THREADS // threads, REGISTERS // (max(8, -(-registers // 8) * 8) * threads))
    return min(fit, SHARED_LIMIT[target] // shared) if shared else fit


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel."""
    found = []
    if row["spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes")
    if row["shared_bytes"] > SHARED_LIMIT[row["target"]]:
        found.append(f"shared memory over {SHARED_LIMIT[row['target']]} bytes")
    if row["tensor_memory_columns"] > TENSOR_MEMORY_COLUMNS:
        found.append(f"tensor memory over {TENSOR_MEMORY_COLUMNS} columns")
    kind, case = row["variant"].split()[1:]
    meant = NARROW.get(f"{row['kernel']} {kind}") or NARROW.get(row["kernel"], Narrow())
    if case != "odd" and row["narrow"] > meant.once:
        found.append(f"{row['narrow']} scalar loads, {meant.once} are meant")
    if case != "odd" and row["narrow_in_loops"] > meant.in_loops:
        found.append(f"{row['narrow_in_loops']} scalar loads in loops, {meant.in_loops} are meant")
    return found


HEAD = f"{'target':7}{'kernel':27}{'variant':18}{'regs':>5}{'shared':>8}{'spill':>6}{'tmem':>5}{'prog':>5}  "


def format_row(row: dict[str, Any]) -> str:
    """One line of the table."""
    head = f"{row['target']:7}{row['kernel']:27}{row['variant']:18}"
    if "registers" not in row:
        return head + row["problem"]
    numbers = f"{row['registers']:>5}{row['shared_bytes']:>8}{row['spill_bytes']:>6}"
    numbers += f"{row['tensor_memory_columns']:>5}{row['programs']:>5}"
    counts = " ".join(f"{name}:{count}" for name, count in (row["loads"] | row["matrix"]).items())
    return f"{head}{numbers}  {counts or '-'}  {row['problem'] or 'ok'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m kdav_fast.kernels.aot", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--targets", default=",".join(SHARED_LIMIT), help="comma-separated")
    parser.add_argument("--kernels", default="", help="only kernels whose name contains this")
    parser.add_argument("--variants", default="", help="only variants that contain this, such as bf16")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    targets = options.targets.split(",")
    for target in targets:
        if target not in SHARED_LIMIT:
            print(f"--targets: {target!r} is not known; allowed: {', '.join(SHARED_LIMIT)}", file=sys.stderr)
            return 2
    if not isinstance(triton_chunk.absorb_kernel, triton.JITFunction):
        print("TRITON_INTERPRET is set, so there is nothing to compile: unset it", file=sys.stderr)
        return 2
    work = [
        Job(target, variant, launch)
        for target in targets
        for launch, variant in launches.all_launches().items()
        if options.kernels in launch.kernel and options.variants in variant
    ]
    if not work:
        print("--kernels and --variants leave nothing to compile", file=sys.stderr)
        return 2

    print(HEAD + "loads of so many bits, matrix instructions")
    rows = []
    with ExitStack() as stack:
        compile_all = map
        if len(work) > 1:
            pool = multiprocessing.get_context("spawn").Pool(min(len(work), os.cpu_count() or 1))
            compile_all = stack.enter_context(pool).imap
        for row in compile_all(compile_job, work):
            row["problem"] = row["problem"] or "; ".join(problems(row))
            rows.append(row)
            print(format_row(row), f"[{len(rows)}/{len(work)}]", flush=True)
    if options.json:
        result = {"torch": torch.__version__, "triton": triton.__version__, "kernels": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    failed = sorted({row["kernel"] for row in rows if row["problem"]})
    cost.show()
    print(
        f"{sum(not row['problem'] for row in rows)} of {len(rows)} clean",
        *failed,
        sep="; at fault: " if failed else "",
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
