"""The tests that need a GPU, file by file: which pass. Exit code 1 if one does not.

    python benchmarks/gpu_tests.py [--device cpu|cuda] [--files FILE ...] [--json FILE]

On a CPU they are skipped, which shows only that they can be collected.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from command_line import Parser, check_device, default_device, result_files
from environment import REPOSITORY, describe
from record import NeverEndedError, Record, failure

from kdav_fast.errors import InputError


def files_with_marks() -> list[str]:
    """Those that have tests for a GPU."""
    found = sorted((REPOSITORY / "tests").rglob("test_*.py"))
    return [str(file.relative_to(REPOSITORY)) for file in found if "mark.gpu" in file.read_text("utf-8")]


def run_file(file: str) -> dict[str, object]:
    """What pytest says of one file's tests for a GPU."""
    arguments = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", file]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    lines = process.stdout.strip().splitlines() or process.stderr.strip().splitlines() or ["it said nothing"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"right": process.returncode == 0, "said": lines[-1], "failed": failed}


def run(options: argparse.Namespace) -> bool:
    """Whether all pass; raises InputError for what the user can mend."""
    device = check_device(options.device)
    path, _ = result_files(options, "gpu_tests")
    code = ("kdav_fast", "kernels", "tests")
    environment = describe(device, ("torch", "triton", "deepspeed", "pytest"), code)
    files = options.files or files_with_marks()
    record = Record(path, environment, {"files": files})
    for file in files:
        if record.find(what=file):
            continue
        try:
            with record.attempt(file):
                row = {"what": file, **run_file(file)}
        except NeverEndedError as error:
            row = {"what": file, "right": False, "error": failure(error)}
        record.add(row)
    record.write()
    for row in record.rows:
        print(f"{'right' if row['right'] else 'WRONG'}  {row['what']:45} {row.get('said', row.get('error'))}")
        for line in row.get("failed", ()):
            print(f"    {line}")
    return all(row["right"] for row in record.rows)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--files", nargs="+", metavar="FILE", help="of this repository (all with such tests)")
    parser.add_argument("--json", type=Path, help="result (benchmarks/results/gpu_tests_DEVICE.json)")
    options = parser.parse_args()
    options.plot = None
    torch.set_num_threads(1)  # what is counted here is right and wrong
    try:
        right = run(options)
    except InputError as error:
        parser.error(str(error))
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
