"""What the probes of a machine have in common: how they answer, and what several of them ask."""

import os
import shutil
import sysconfig
from importlib import metadata
from pathlib import Path

import torch

from kdav_fast.doctor.findings import State

INSTALL = "pip install 'kdav_fast'"
TORCH_FROM_PYPI = "pip install 'torch>=2.11,<2.13' from PyPI, whose Linux builds have CUDA, nccl and gloo"

Answer = tuple[State, str]  # what a probe returns: "on" or "info", and the detail


class Off(Exception):  # noqa: N818 - an answer, not an error
    """Raised by a probe: why the thing is off, and what would turn it on."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.remedy = remedy


def version_of(package: str) -> str:
    """An installed package's version; off where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise Off(f"{package} is not installed", INSTALL) from None


def command(name: str, use: str, package: str) -> Answer:
    """The path of a command. `use` says what lacks without it, `package` what Debian calls what has it."""
    path = shutil.which(name)
    if not path:
        raise Off(f"no {name} on PATH; {use}", f"apt-get install {package}")
    return "on", path


def capability(consequence: str) -> tuple[int, int]:
    """The first GPU's compute capability; where there is none, off with that consequence."""
    if not torch.cuda.is_available():
        raise Off(f"there is no GPU that torch can use; {consequence}", "a GPU; see the finding 'GPU'")
    return torch.cuda.get_device_capability(0)


def need_capability(least: tuple[int, int], what: str, model: str) -> None:
    """Off where the first GPU, if there is one, has less than `what` needs; a `model` has it."""
    found = capability(what)
    if found < least:
        needed = f"compute capability {least[0]}.{least[1]}"
        raise Off(
            f"{what} needs {needed}, this GPU has {found[0]}.{found[1]}", f"a GPU like {model} or newer"
        )


def compiler() -> str:
    """The C++ compiler for kernels that are built on this machine; off where something for that is missing."""
    path = shutil.which((os.environ.get("CXX", "").split() or ["g++"])[0])
    if not path:
        raise Off("no C++ compiler (g++, or the one that CXX names)", "apt-get install g++, or set CXX")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        remedy = f"apt-get install python{sysconfig.get_python_version()}-dev"
        raise Off("Python's headers (Python.h), which compiled kernels need, are missing", remedy)
    return path
