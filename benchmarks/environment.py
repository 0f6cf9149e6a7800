"""What a result was measured on."""

import datetime
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

_REPOSITORY = Path(__file__).resolve().parent.parent


def describe(
    device: torch.device, packages: tuple[str, ...] = ("torch", "triton", "numpy")
) -> dict[str, object]:
    """Device, date, versions of some installed packages, and command, for a results file."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine() + " CPU"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
        "command": " ".join(["python", *(_portable(argument) for argument in sys.argv)]),
    }


def _portable(argument: str) -> str:
    """Without the part of a path that only means something on this machine."""
    option, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    inside = path.is_relative_to(_REPOSITORY)
    return f"{option}{equals}{path.relative_to(_REPOSITORY) if inside else path.name}"
