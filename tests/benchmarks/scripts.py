"""What the tests of the benchmarks share."""

import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.train.processes import Fork

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def save_images(root: Path) -> Path:
    """Two class folders with three files of noise."""
    noise = np.random.default_rng(0)
    for place in ("cat/0.jpg", "cat/1.JPEG", "dog/2.png"):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (20, 30, 3), np.uint8)).save(root / place)
    return root


def completed(script: str, arguments: Sequence[str]) -> subprocess.CompletedProcess:
    """A script, run to its good end. In a process of its own, since most pin themselves to cores."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    process = Fork([BENCHMARKS / script, *arguments], environment)
    try:
        output, errors = process.communicate(timeout=500)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return subprocess.CompletedProcess(script, 0, output, errors)


def refusal(script: str, arguments: list[str], monkeypatch, capsys) -> str:
    """The one line with which a script, run in this process, ends at bad input."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line
