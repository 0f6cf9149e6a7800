"""What a result was measured on."""

import datetime
import hashlib
import platform
import sys
from importlib import metadata, util
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = {"nvidia-dali-cuda130": "nvidia.dali", "pillow": "PIL"}
"""What to import of a package, where that is not its name."""


def describe(
    device: torch.device,
    packages: tuple[str, ...] = ("torch", "triton", "numpy"),
    code: tuple[str, ...] = ("kdav_fast", "kernels"),
) -> dict[str, object]:
    """Device, date, versions of some packages, the code that is measured, and command, for a results file.

    Args:
        packages: None stands for the version of one that is not installed.
        code: files and folders of this repository.
    """
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine() + " CPU"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "code": digest(*code),
        "command": " ".join(["python", *(_portable(argument) for argument in sys.argv)]),
    }


def version(package: str) -> str | None:
    """None if it is not installed."""
    if not importable(MODULES.get(package, package)):
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def importable(module: str) -> bool:
    """Whether there is such a module, without running it."""
    try:
        return util.find_spec(module) is not None
    except ImportError:  # the package that it belongs to is not there
        return False


def digest(*places: str) -> str:
    """Of the Python files in these places of the repository."""
    found = hashlib.sha256()
    for place in map(REPOSITORY.joinpath, places):
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            found.update(file.relative_to(REPOSITORY).as_posix().encode() + file.read_bytes())
    return found.hexdigest()[:16]


def _portable(argument: str) -> str:
    """Without the part of a path that only means something on this machine."""
    option, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    inside = path.is_relative_to(REPOSITORY)
    return f"{option}{equals}{path.relative_to(REPOSITORY) if inside else path.name}"
