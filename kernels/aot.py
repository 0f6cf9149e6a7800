"""Compiles every Triton kernel without a GPU and reports what the machine code needs.

    python -m kdav_fast.kernels.aot --targets sm_80,sm_90,sm_100 [--json FILE]

Exit codes: 0 all clean; 1 a kernel spills, asks for more shared or tensor memory than the device has, or does not
compile; 2 bad arguments.
"""

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdav_fast.kernels import triton_chunk, triton_kdav, triton_kernels
from kdav_fast.kernels.tiles import TILES

# Bytes of shared memory that one block may ask for (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
TENSOR_MEMORY_COLUMNS = 512
# Instructions of the matrix units in SASS: Ampere's, Hopper's, Blackwell's.
MATRIX_INSTRUCTIONS = {"HMMA": r"\bHMMA\.", "HGMMA": r"\bHGMMA\.", "UTCMMA": r"\bUTC\w*MMA\b"}
POINTER_NAME = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}
SHORT_NAME = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "ids"}
INPUTS = ("student", "teacher", "memory", "logits", "grad")
INTEGERS = (
    "batch", "length", "width", "classes", "class_groups", "splits", "class_splits", "columns",
)  # fmt: skip
REALS = ("kappa_student", "kappa_teacher", "temperature", "eps")


class Job(NamedTuple):
    """One kernel with one set of constants, for one target."""

    target: str
    kernel: str
    variant: str
    pointers: dict[str, str]
    """Types of the arguments that are not float32 pointers, by name."""
    constants: dict[str, Any]
    options: dict[str, int]


def jobs(target: str, classes: int = 1000) -> Iterator[Job]:
    """Every kernel at every tile configuration in use, for each dtype and kind of posterior."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        inputs = dict.fromkeys(INPUTS, POINTER_NAME[dtype])
        yield from _product_jobs(target, dtype, inputs, classes)
        constants = {"BLOCK_K": triton_kdav.DIVERGENCE_BLOCK_K, "BLOCK_S": triton_kdav.MAX_SPLITS}
        ratio = dtype if dtype == torch.bfloat16 else torch.float32
        pointers = inputs | {"ratio": POINTER_NAME[ratio]}
        yield Job(target, "divergence_kernel", SHORT_NAME[dtype], pointers, constants, {})
        for width in (512, 4096):
            variant = f"{SHORT_NAME[dtype]} d {width}"
            yield Job(target, "embedding_gradient_kernel", variant, inputs, {"BLOCK_W": width}, {})
        for masked in (False, True):
            weights = {"weights": POINTER_NAME[dtype], "slope": POINTER_NAME[dtype]}
            constants = {"MASKED": masked, "BLOCK": triton_chunk.BLOCK}
            variant = f"{SHORT_NAME[dtype]}{' masked' * masked}"
            yield Job(target, "absorb_kernel", variant, weights, constants, {})
            yield Job(target, "slope_kernel", variant, weights, constants, {})


def _product_jobs(target: str, dtype: torch.dtype, inputs: dict[str, str], classes: int) -> Iterator[Job]:
    tiles = TILES[target]
    for posterior in (dtype, torch.int64):
        dense = posterior != torch.int64
        products = triton_kdav.product_constants(dtype, posterior, classes)
        ratio = posterior if posterior == torch.bfloat16 else torch.float32
        pointers = inputs | {"posterior": POINTER_NAME[posterior], "ratio": POINTER_NAME[ratio]}
        variant = f"{SHORT_NAME[dtype]} {'dense' if dense else 'ids'}"
        for kernel, tile in {
            "class_kernel": tiles["dense" if dense else "ids"][dtype],
            "gradient_kernel": tiles["gradient"][dtype],
        }.items():
            yield Job(target, kernel, variant, pointers, tile.constants() | products, tile.options())
    # This one does not read the posterior.
    tile = tiles["membership"][dtype]
    constants = tile.constants() | {key: products[key] for key in ("DTYPE", "PRECISION")}
    yield Job(target, "membership_kernel", SHORT_NAME[dtype], inputs, constants, tile.options())


def compile_job(job: Job) -> dict[str, Any]:
    """Compiles one job; returns its row of the table, with `problem` empty where it is clean."""
    row: dict[str, Any] = {"target": job.target, "kernel": job.kernel, "variant": job.variant, "problem": ""}
    module = triton_chunk if hasattr(triton_chunk, job.kernel) else triton_kernels
    function = getattr(module, job.kernel)
    constants = {key: job.constants[key] for key in function.arg_names if key in job.constants}
    signature = {name: _argument_type(name, job.pointers, constants) for name in function.arg_names}
    aligned = [
        (index,)
        for index, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or name in ("length", "width", "columns")
    ]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs=constants,
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    target = GPUTarget("cuda", int(job.target.removeprefix("sm_")), 32)
    try:
        compiled = triton.compile(source, target=target, options=job.options)
    except Exception as error:  # whatever a compiler pass raises is this row's result
        message = " ".join(str(error).split())[-300:]  # the reason comes last, after the source
        return row | {"problem": f"does not compile: {type(error).__name__}: {message}"}
    return row | inspect_binary(job.target, compiled)


def _argument_type(name: str, pointers: dict[str, str], constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in INTEGERS:
        return "i32"
    if name in REALS:
        return "fp32"
    return {"filled": "*i64", "valid": "*i64"}.get(name) or pointers.get(name, "*fp32")


def inspect_binary(target: str, compiled: Any) -> dict[str, Any]:
    """Registers, memory and matrix instructions of a compiled kernel, and what is wrong with it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True)
        sass = subprocess.run([tool, "-sass", cubin.name], capture_output=True, text=True, check=True)
    registers, stack, local = (
        int(re.search(rf"\b{key}:(\d+)", usage.stdout)[1]) for key in ("REG", "STACK", "LOCAL")
    )
    row = {
        "registers": registers,
        "shared_bytes": compiled.metadata.shared,
        "spill_bytes": stack + local,
        "tensor_memory_columns": getattr(compiled.metadata, "tmem_size", 0) or 0,
    }
    row |= {name: len(re.findall(pattern, sass.stdout)) for name, pattern in MATRIX_INSTRUCTIONS.items()}
    problems = []
    if row["spill_bytes"]:
        problems.append(f"spills {row['spill_bytes']} bytes")
    if row["shared_bytes"] > SHARED_LIMIT[target]:
        problems.append(f"shared memory over {SHARED_LIMIT[target]} bytes")
    if row["tensor_memory_columns"] > TENSOR_MEMORY_COLUMNS:
        problems.append(f"tensor memory over {TENSOR_MEMORY_COLUMNS} columns")
    return row | {"problem": "; ".join(problems)}


def format_row(row: dict[str, Any]) -> str:
    """One line of the table."""
    head = f"{row['target']:7}{row['kernel']:27}{row['variant']:13}"
    if "registers" not in row:
        return head + row["problem"]
    matrix = " ".join(f"{name}:{row[name]}" for name in MATRIX_INSTRUCTIONS if row[name]) or "-"
    numbers = f"{row['registers']:>5}{row['shared_bytes']:>8}{row['spill_bytes']:>7}"
    return f"{head}{numbers}{row['tensor_memory_columns']:>6}  {matrix:12} {row['problem'] or 'ok'}"


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
    if not isinstance(triton_kernels.class_kernel, triton.JITFunction):
        print("TRITON_INTERPRET is set, so there is nothing to compile: unset it", file=sys.stderr)
        return 2
    work = [
        job
        for target in targets
        for job in jobs(target)
        if options.kernels in job.kernel and options.variants in job.variant
    ]
    if not work:
        print("--kernels and --variants leave nothing to compile", file=sys.stderr)
        return 2

    print(
        f"{'target':7}{'kernel':27}{'variant':13}{'regs':>5}{'shared':>8}{'spill':>7}{'tmem':>6}  matrix instructions"
    )
    rows = []
    with multiprocessing.get_context("spawn").Pool() as pool:
        for row in pool.imap(compile_job, work):
            rows.append(row)
            print(format_row(row), f"[{len(rows)}/{len(work)}]", flush=True)
    if options.json:
        result = {"torch": torch.__version__, "triton": triton.__version__, "kernels": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    failed = sum(bool(row["problem"]) for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} clean")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
