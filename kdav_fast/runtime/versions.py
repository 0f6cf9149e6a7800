"""The versions that results depend on, from the packages' metadata: importing them would take seconds."""

from importlib import metadata
from platform import python_version

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "nvidia-dali-cuda130", "triton")


def versions() -> dict[str, str | None]:
    """This package's version, Python's, then each one's by name; None for what is not installed."""
    packages = {package: _version(package) for package in PACKAGES}
    return {"kdav_fast": _version("kdav_fast"), "Python": python_version(), **packages}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
