"""What a result was measured on."""

import datetime
import platform
import sys
from importlib import metadata

import torch


def describe(device: torch.device) -> dict[str, object]:
    """Device, date, versions and command, for a results file."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine() + " CPU"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in ("torch", "triton", "numpy")},
        "command": " ".join(["python", *sys.argv]),
    }
