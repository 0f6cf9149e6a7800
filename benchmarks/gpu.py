"""All benchmarks on one GPU in less than 10 minutes, and a short table last.

    CIFAR=FOLDER PHOTOS=FOLDER RESULTS=FOLDER python benchmarks/gpu.py

Each has a limit; one that fails or does not end within it is named in the table, and the next one starts. The folders
are those of `make bench`; without PHOTOS the training step makes its images, and loaders are not measured.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
LIMITS = {"loss_kernel": 100, "training_step": 225, "data_pipeline": 45, "accuracy": 165, "scale": 60}
"""Seconds; 590 in all. The kernels come first."""


def commands(results: Path) -> dict[str, list[str]]:
    """Arguments of each benchmark, shorter than its presets' where all must share the time."""
    photos, cifar = Path(os.environ.get("PHOTOS", "")), Path(os.environ.get("CIFAR", ""))
    has_photos = "PHOTOS" in os.environ and photos.is_dir()
    wanted = {
        "loss_kernel": ["--seconds=0.3"],
        "training_step": ["--seconds=7", *([f"--root={photos}"] if has_photos else [])],
        "data_pipeline": [f"--root={photos}", "--seconds=4", "--round-seconds=1"] if has_photos else None,
        "accuracy": [f"--root={cifar}", "--minutes=2", "--work", str(results / "accuracy")]
        if "CIFAR" in os.environ and cifar.is_dir()
        else None,
        "scale": ["--rounds=3", "--round-seconds=1"],
    }
    scripts = {name: arguments for name, arguments in wanted.items() if arguments is not None}
    return {
        name: [
            *(sys.executable, str(HERE / f"{name}.py"), "--device=cuda"),
            *(*arguments, f"--json={results / f'{name}_cuda.json'}"),
        ]
        for name, arguments in scripts.items()
    }


def run(command: list[str], limit: float) -> tuple[str, float]:
    """How it ended, and its seconds. Its workers end with it."""
    began = time.monotonic()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(limit)
        outcome = "done" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        outcome = f"not done within {limit} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()
    return outcome, time.monotonic() - began


def targets(results: Path, name: str) -> list[str]:
    """One line a target that a result states about itself."""
    file = results / f"{name}_cuda.json"
    stated = json.loads(file.read_text()).get("targets", []) if file.exists() else []
    verdict = {True: "met", False: "missed", None: "not measured"}
    return [
        f"    {t['name']}: {t['measured']} (target {t['target']}) {verdict[t['met']]}" for t in stated or []
    ]


def main() -> None:
    if not torch.cuda.is_available():
        print("gpu.py: torch finds no GPU; run `make bench` for the CPU presets", file=sys.stderr)
        sys.exit(2)
    results = Path(os.environ.get("RESULTS", HERE / "results"))
    results.mkdir(parents=True, exist_ok=True)
    listed = commands(results)
    outcomes = {}
    for name, limit in LIMITS.items():
        if name in listed:
            print(f"== {name}, at most {limit} s", flush=True)
            outcomes[name] = run(listed[name], limit)
        else:
            outcomes[name] = "no images: give PHOTOS or CIFAR", 0.0
    print("\nbenchmark      seconds  outcome")
    for name, (outcome, seconds) in outcomes.items():
        print(f"{name:14}{seconds:8.0f}  {outcome}")
        if outcome == "done":
            print("\n".join(targets(results, name)))
    if any(outcome != "done" for outcome, _ in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
