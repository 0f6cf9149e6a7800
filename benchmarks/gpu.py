"""All benchmarks on one GPU, part by part, and the targets last.

    python benchmarks/gpu.py [PART ...] [--minutes N] [--photos FOLDER] [--cifar FOLDER] [--teacher FILE]
    python benchmarks/gpu.py --list

Each part has a limit; what it has measured by then is in its result, and the same command goes on from there: a
machine that is lent for ten minutes at a time is asked again. What cannot be measured, for want of a package, of images
or because it fails, is named with its reason, and the rest goes on. `--device cpu --preset tiny` rehearses all of it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from command_line import RESULT_FOLDER, Parser, positive
from gpu_stages import PARTS, command, result_file, why_not
from record import GO_ON
from summary_results import read_results
from summary_targets import design_targets

from kdav_fast.errors import InputError

PRESETS = ("full", "tiny")
DONE = "done"
PATIENCE = 10
"""Seconds to end in, once asked to: what is being measured is then not blamed for it."""
REHEARSED = 500
"""Seconds for a part of a rehearsal, on a machine that may have much else to do."""


def run(arguments: list[str], limit: float) -> tuple[str, float]:
    """How it ended, and its seconds. Its workers end with it; one that asks to be started again is, in its time."""
    began = time.monotonic()
    while True:
        process = subprocess.Popen(arguments, start_new_session=True)
        try:
            code = process.wait(max(0.0, limit - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            return f"not done within {limit:.0f} s: the same command goes on", time.monotonic() - began
        finally:
            with suppress(ProcessLookupError):  # nobody of it is left
                os.killpg(process.pid, 9)  # it, or the workers that it left behind
            process.wait()
        if code != GO_ON:
            return DONE if code == 0 else f"exit code {code}", time.monotonic() - began


def left_out(name: str, options: argparse.Namespace) -> list[str]:
    """What a part's result says it could not measure, a line each."""
    try:
        result = json.loads(result_file(name, options).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    found = [f"{what}: {reason}" for what, reason in (result.get("not_measured") or {}).items()]
    found += [
        f"{row['contender']}: its first loss is not the reference's ({row['relative_difference']:.1e})"
        for row in result.get("first_step") or []
        if not row["equal"]
    ]
    label = ("what", "shape", "pass", "implementation")
    for row in result.get("rows") or []:
        if "error" in row or row.get("right") is False:
            what = " ".join(str(row[key]) for key in label if key in row)
            found.append(f"{what}: {row.get('error', 'wrong')}")
    return found


def run_all(options: argparse.Namespace) -> dict[str, tuple[str, float]]:
    """How each part ended, and its seconds."""
    deadline = time.monotonic() + 60 * options.minutes
    outcomes = {}
    for name in options.parts or PARTS:
        reason, left = why_not(name, options), deadline - time.monotonic()
        if reason is None and left < 1:
            reason = f"the {options.minutes:g} minutes are over: the same command goes on"
        if reason is not None:
            outcomes[name] = f"not measured: {reason}", 0.0
            continue
        limit = min(PARTS[name].limit if options.preset == "full" else REHEARSED, left)
        print(f"== {name}, at most {limit:.0f} s", flush=True)
        outcomes[name] = run(command(name, options), limit)
    return outcomes


def print_tables(outcomes: dict[str, tuple[str, float]], options: argparse.Namespace) -> None:
    """Every part and what it could not measure, then every target of the design."""
    print(f"\n{'part':15}{'seconds':>8}  outcome")
    for name, (outcome, seconds) in outcomes.items():
        print(f"{name:15}{seconds:8.0f}  {outcome}")
        for line in left_out(name, options):
            print(f"{'':25}{line}")
    print(f"\n{'target':58}{'wanted':>12}{'measured':>22}")
    for target in design_targets(read_results(options.results)):
        print(f"{target.name:58}{target.target:>12}{target.measured:>22}  {target.state}")


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, given = parser.add_argument, os.environ.get
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    add("--list", action="store_true", help="the parts, their limits, and what stands in their way here")
    add("--minutes", type=positive(float), default=60.0, help="of all parts together (%(default)s)")
    for name, what in (
        ("photos", "class folders of photographs ($PHOTOS; without it, the step's are made)"),
        ("cifar", "train/CLASS/ and test/CLASS/ of CIFAR-10 as image files ($CIFAR)"),
        ("teacher", "the file of a trained teacher for CIFAR-10, or its run ($TEACHER; else one is trained)"),
    ):
        add(f"--{name}", type=Path, default=given(name.upper()), help=what)
    add(
        "--results", type=Path, default=given("RESULTS", RESULT_FOLDER), help="folder ($RESULTS; %(default)s)"
    )
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only with --preset tiny")
    add("--preset", choices=PRESETS, default="full", help="(%(default)s)")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raises InputError for what the user can mend; folders that are not there count as not given."""
    for name in options.parts:
        if name not in PARTS:
            raise InputError(f"there is no part '{name}'; give some of {', '.join(PARTS)}")
    for name in ("photos", "cifar", "teacher"):
        place = getattr(options, name)
        if place is not None and not place.exists():
            print(f"--{name} {place} does not exist: going on without", file=sys.stderr)
            setattr(options, name, None)
    if options.device == "cpu" and options.preset != "tiny":
        raise InputError(
            "--device cpu goes with --preset tiny, a rehearsal; run `make bench` for a CPU's figures"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "torch finds no GPU; run `make bench` for the CPU presets, or give --device cpu --preset tiny"
        )
    options.results.mkdir(parents=True, exist_ok=True)


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    if options.list:
        for name, part in PARTS.items():
            print(f"{name:15}{part.limit:5} s  {why_not(name, options) or 'can be run'}")
        return
    try:
        check_options(options)
        outcomes = run_all(options)
        print_tables(outcomes, options)
    except InputError as error:
        parser.error(str(error))
    sys.exit(0 if all(outcome == DONE for outcome, _ in outcomes.values()) else 1)


if __name__ == "__main__":
    main()
