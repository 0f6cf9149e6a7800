"""The kernels compiled without a GPU: what is compiled, what is reported, what is refused."""

import json
import os
import subprocess
import sys

import pytest

from kdav_fast.kernels import aot


def run(*command):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


# One process, because importing torch takes longer than what it does here.
SCRIPT = """
import json, sys
from kdav_fast.kernels import aot, launches
one = ["--targets", "sm_90", "--kernels", "chunked_slope", "--variants", "bf16 ids masked", "--json", sys.argv[1]]
print("exit", aot.main(one))
aot.NARROW.clear()
print("exit", aot.main(one[:-2]))
found = launches.all_launches().items()
print(json.dumps([[name, *launch._replace(constants=dict(launch.constants))] for launch, name in found], default=str))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the script printed, and the JSON of its first run."""
    path = tmp_path_factory.mktemp("aot") / "aot.json"
    result = run("-c", SCRIPT, str(path))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, json.loads(path.read_text())


def test_kernels_compile_ahead_of_time(report):
    printed, result = report
    (row,) = result["kernels"]
    assert row["spill_bytes"] == 0
    assert row["loads"]["LDG.128"] >= 2  # similarities of 8 columns a thread
    assert row["programs"] >= 2
    assert "PREDICTED" in printed
    assert "1 of 1 clean\nexit 0\n" in printed


def test_scalar_loads_are_an_error_that_names_the_kernel(report):
    """A kernel that looks 8 ratios up by class, where none are meant."""
    printed, _ = report
    assert " scalar loads, 8 are meant" in printed
    assert "0 of 1 clean; at fault: chunked_slope_kernel\nexit 1\n" in printed


def compiled(**changes):
    row = {
        "target": "sm_90",
        "kernel": "k",
        "variant": "bf16 dense masked",
        "spill_bytes": 0,
        "shared_bytes": 0,
    }
    return row | {"tensor_memory_columns": 0, "narrow": 0, "narrow_in_loops": 0} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 2**20}, "shared memory over 232448 bytes"),
        ({"tensor_memory_columns": 513}, "tensor memory over 512 columns"),
        ({"narrow": 9}, "9 scalar loads, 8 are meant"),
        ({"narrow_in_loops": 1}, "1 scalar loads in loops, 0 are meant"),
    ],
)
def test_problems(changes, message):
    assert aot.problems(compiled(**changes)) == [message]
    assert aot.problems(compiled()) == []


def test_rows_that_start_anywhere_may_be_loaded_by_the_value():
    assert aot.problems(compiled(variant="bf16 dense odd", narrow=99, narrow_in_loops=99)) == []


def test_programs_of_a_multiprocessor():
    assert aot.programs("sm_90", 32, 128, 0) == 16  # by threads
    assert aot.programs("sm_90", 100, 256, 32) == 2  # by registers, 104 a thread
    assert aot.programs("sm_80", 32, 32, 0) == 32
    assert aot.programs("sm_80", 32, 128, 64 * 1024) == 2  # by shared memory


def test_what_is_compiled_is_what_is_launched(report):
    found = {}
    for name, _, kernel, signature, constants, divisible, options in json.loads(report[0].splitlines()[-1]):
        places = {signature[place][0] for place in divisible}
        found.setdefault((kernel, name), []).append((dict(signature), constants, places, dict(options)))
    (signature, constants, divisible, options) = found["absorb_kernel", "bf16 dense masked"][0]
    assert signature["filled"] == "*i64"
    assert (constants["MASKED"], constants["BLOCK"], options["num_warps"]) == (True, 4096, 8)
    assert {"similarity", "start", "columns", "mass_width"} <= divisible
    # The last slice of an odd memory; a memory of one row, whose count is a constant.
    assert any(
        "columns" not in divisible for _, _, divisible, _ in found["chunked_slope_kernel", "bf16 ids odd"]
    )
    assert found["chunked_slope_kernel", "bf16 ids one"][0][1]["columns"] == 1


def test_an_unknown_target_is_refused():
    result = run("-m", "kdav_fast.kernels.aot", "--targets", "sm_80,sm_42")
    assert result.returncode == 2
    assert result.stderr == "--targets: 'sm_42' is not known; allowed: sm_80, sm_90, sm_100\n"
