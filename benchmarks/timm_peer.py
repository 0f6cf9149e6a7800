"""timm's own train.py beside the contenders of training_step.py: a program of its own, on the same files and networks.

It distils by logits (its `--kd-model-name`), with random crops and flips as the others, from a teacher with random
weights, which cost what trained ones do. Its rates are those that it prints: of every step but the first few. It runs
alone, after the others, which then stand still.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import quantiles

from kdav_fast.errors import InputError

PEERS = {
    "timm train.py fp32 channels_last": [],
    "timm train.py bf16 channels_last": ["--amp", "--amp-dtype=bfloat16"],
}
WARM_UP = 3
"""Steps that are not counted."""
LONGEST_START_S = 300.0
STEP = re.compile(r"Train: .* Time: ([0-9.]+)s, +([0-9.]+)/s")
# timm offers only teachers with weights that it would download.
START = """
import runpy, sys
try:
    import timm.task.distillation as distillation
    create = distillation.create_model
    distillation.create_model = lambda *a, **k: create(*a, **{**k, "pretrained": False})
except ImportError:
    pass
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def why_not(checkout: Path | None, teacher: str, student: str) -> str:
    """Why there is no such contender, in one line; empty if there is one.

    Raises:
        InputError: `checkout` holds no train.py.
    """
    if checkout is None:
        return "timm's train.py is not measured: give --timm FOLDER, a checkout of huggingface/pytorch-image-models"
    script = checkout / "train.py"
    if not script.is_file():
        raise InputError(
            f"--timm {checkout} holds no train.py; give a checkout of huggingface/pytorch-image-models"
        )
    if "--kd-model-name" not in script.read_text(encoding="utf-8"):
        return f"timm's train.py is not measured: {script} has no --kd-model-name, so it cannot distil"
    for network in (teacher, student):
        if not network.startswith("timm:"):
            return f"timm's train.py is not measured: {network} is not of timm; give --teacher and --student of it"
    return ""


def run_peer(
    name: str, checkout: Path, tree: Path, sizes: dict[str, Any], device: str, cores: int, seconds: float
) -> dict[str, Any]:
    """A row of one of PEERS.

    Args:
        name: which.
        checkout: holds train.py and the timm that it goes with.
        tree: `train/CLASS/IMAGE`, with enough images that no epoch ends meanwhile.
        sizes: teacher, student, image_size, batch_size and classes.
        device: cpu or cuda.
        cores: workers that decode.
        seconds: to measure after the first steps.

    Raises:
        InputError: it ended by itself or printed no step.
    """
    command = [
        *(sys.executable, "-c", START, str(checkout.resolve() / "train.py"), f"--data-dir={tree.resolve()}"),
        *("--train-split=train", "--val-split=train", f"--model={sizes['student'].removeprefix('timm:')}"),
        *(f"--kd-model-name={sizes['teacher'].removeprefix('timm:')}", "--kd-distill-type=logit"),
        *(f"--num-classes={sizes['classes']}", f"--img-size={sizes['image_size']}", f"--workers={cores}"),
        *(f"--batch-size={sizes['batch_size']}", f"--device={device}", "--channels-last", "--log-interval=1"),
        *("--epochs=1", "--opt=sgd", "--lr=0.01", "--color-jitter=0", *PEERS[name]),
    ]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        process = subprocess.Popen(
            [*command, f"--output={folder}"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            steps, last = _read_steps(process, seconds)
        finally:
            _end(process)
    if not steps:
        raise InputError(f"timm's train.py printed no step to measure; its last line: {last}")
    rates = [rate for _, rate in steps]
    return {
        "contender": name,
        **quantiles(rates, "images_per_s"),
        **quantiles([second for second, _ in steps], "step_s"),
        "images": len(steps) * sizes["batch_size"],
        "seconds": sum(second for second, _ in steps),
        "start_up_s": time.monotonic() - begun - sum(second for second, _ in steps),
        "compiled_graphs": 0,
        "step_memory_mib": None,
        "peak_memory_mib": None,
        "rounds_images_per_s": rates,
    }


def _read_steps(process: subprocess.Popen, seconds: float) -> tuple[list[tuple[float, float]], str]:
    """Seconds and images a second of each step after the warm-up, and the last line."""
    steps: list[tuple[float, float]] = []
    line, seen, deadline = "", 0, time.monotonic() + LONGEST_START_S
    for line in process.stdout:
        found = STEP.search(line)
        if found:
            seen += 1
            if seen > WARM_UP:
                steps.append((float(found[1]), float(found[2])))
        if sum(second for second, _ in steps) >= seconds or time.monotonic() > deadline + seconds:
            break
    return steps, line.strip()


def _end(process: subprocess.Popen) -> None:
    """With its loaders' workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
