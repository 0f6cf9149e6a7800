"""The parts of benchmarks/gpu.py: what each runs, for how long, and what it needs."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from environment import version

HERE = Path(__file__).resolve().parent
Arguments = list[str]
Options = argparse.Namespace
"""With photos, cifar, teacher (paths or None), results, device, preset."""
MAIN_METHODS = ("labels only", "KD", "SimKD", "KDAV", "KDAV, kappa 20")


class Part(NamedTuple):
    """One script, which goes on where it was stopped."""

    limit: int
    """Seconds on a GPU; nine minutes at most, so that a machine lent for ten does one part at least."""
    full: Callable[[Options], Arguments]
    tiny: Callable[[Options], Arguments]
    """The same in seconds on a CPU: a rehearsal, which says nothing about speed."""
    packages: tuple[str, ...] = ()
    """Without which nothing of it can be measured."""
    images: str | None = None
    """Which of the options must name a folder."""


def _root(folder: Path | None) -> Arguments:
    return [f"--root={folder}"] if folder else []


def _accuracy(options: Options) -> Arguments:
    given = [f"--teacher={options.teacher}"] if options.teacher else []
    return [*_root(options.cifar), f"--work={options.results / 'accuracy'}", *given]


_SMALL_STEP = ["--teacher=cifar:resnet8", "--student=cifar:resnet8", "--image-size=16", "--batch-size=8"]
_SMALL_STEP += ["--memory-length=64"]
PARTS = {
    "check": Part(300, lambda options: ["--preset=full"], lambda options: ["--preset=tiny"]),
    "loss_kernel": Part(
        420, lambda options: ["--seconds=0.3"], lambda options: ["--preset=tiny", "--seconds=0.02"]
    ),
    "training_step": Part(
        500,
        lambda options: ["--seconds=8", *_root(options.photos)],
        lambda options: [
            *(
                *_SMALL_STEP,
                "--classes=4",
                "--images=6",
                "--cores=1",
                "--round-seconds=0.02",
                "--seconds=0.06",
            ),
            *(
                *_root(options.photos),
                "--fast",
                "model.compile=false",
                "teacher.compile=false",
                "--contenders",
            ),
            *("kdav_fast", "kdav_fast synthetic", "kdav_fast synthetic, plain module"),
        ],
        packages=("pydantic",),
    ),
    "method_costs": Part(
        540,
        lambda options: [],
        lambda options: [
            *("--teacher=cifar:resnet8", "--student=cifar:resnet8", "--image-size=16", "--batch-size=8"),
            *("--classes=4", "--images=40", "--rounds=2", "--turn-seconds=0.01"),
            *("--methods", "kd", "mld", "crd"),
        ],
        packages=("pydantic", "deepspeed"),
    ),
    "data_pipeline": Part(
        150,
        lambda options: [*_root(options.photos), "--seconds=4", "--round-seconds=1"],
        lambda options: [
            *(*_root(options.photos), "--images=8", "--size=16", "--batch-size=4", "--cores=1"),
            *("--seconds=0.05", "--round-seconds=0.02"),
        ],
        packages=("pydantic",),
        images="photos",
    ),
    "reading": Part(
        200,
        lambda options: ["--rounds=5", "--cores=4", *_root(options.photos)],
        lambda options: [
            *("--images=6", "--batch-size=4", "--cores=1", "--rounds=2", "--round-seconds=0.02"),
            "--work-ms=0.1",
        ],
        packages=("pydantic",),
    ),
    "accuracy": Part(
        300,
        lambda options: [*_accuracy(options), "--minutes=5", "--methods", *MAIN_METHODS],
        lambda options: [
            *(*_accuracy(options), "--workers=1", "--eager", "--epochs=1", "--train-subset=130", "--seeds=1"),
            *("--methods", "KD", "KDAV", "--override", "teacher.name=cifar:resnet8", "teacher.width=0.25"),
            *("model.width=0.25", "data.image_size=16"),
        ],
        packages=("pydantic",),
        images="cifar",
    ),
    "scale": Part(
        90,
        lambda options: ["--rounds=3", "--round-seconds=1"],
        lambda options: [
            *(*_SMALL_STEP, "--classes=4", "--processes", "1", "2", "--rounds=1", "--round-seconds=0.05"),
        ],
        packages=("pydantic", "deepspeed"),
    ),
    "gpu_tests": Part(
        540,
        lambda options: [],
        lambda options: ["--files", "tests/kernels/test_accuracy.py", "tests/train/test_gpu_runs.py"],
        packages=("pytest",),
    ),
}
"""In the order in which they are run: what is wrong is known first."""


def why_not(name: str, options: Options) -> str | None:
    """What stands in a part's way; None if nothing does."""
    part = PARTS[name]
    absent = [package for package in part.packages if version(package) is None]
    if absent:
        return f"{' and '.join(absent)} not installed"
    if part.images and getattr(options, part.images) is None:
        return f"no images: give --{part.images} FOLDER"
    return None


def result_file(name: str, options: Options) -> Path:
    return options.results / f"{name}_{options.device}.json"


def command(name: str, options: Options) -> Arguments:
    part = PARTS[name]
    arguments = part.tiny(options) if options.preset == "tiny" else part.full(options)
    own = [f"--device={options.device}", f"--json={result_file(name, options)}"]
    return [sys.executable, str(HERE / f"{name}.py"), *own, *arguments]
