"""What all processes of a run must have alike, and how they say which of them has something else."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from kdav_fast.errors import listed

_PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "nvidia-dali-cuda130", "numpy", "triton")
_NAMED = 3
"""So many differing facts are named."""


def difference(facts: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """What the processes do not have alike, in one line; empty if they agree.

    Args:
        facts: of each process its name and its facts, values by what they are of.
    """
    (first, expected), *others = facts
    for name, found in others:
        unlike = [
            key
            for key in sorted(expected.keys() | found.keys(), key=method_first)
            if expected.get(key) != found.get(key)
        ]
        if unlike:
            told = [
                f"{key} is {expected.get(key, 'unknown')} on {first} and {found.get(key, 'unknown')} on {name}"
                for key in unlike
            ]
            return (
                f"the processes of the run do not have the same: {listed(told, _NAMED, '; ')}; "
                "start all of them alike"
            )
    return ""


def method_first(key: str) -> tuple[bool, str]:
    """Order of config keys in messages: of two methods, each has keys that mean nothing to the other."""
    return key != "distiller.name", key


@cache
def code_facts() -> dict[str, str]:
    """The versions of Python, of the packages that compute, and of this package with its source."""
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        **versions,
        "kdav_fast": f"{_version('kdav_fast')}, source {_source_digest()[:12]}",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _source_digest() -> str:
    digest = hashlib.sha256()
    for package in ("kdav_fast", "kdav_fast.kernels"):  # which may lie elsewhere
        for folder in find_spec(package).submodule_search_locations:
            for file in sorted(Path(folder).rglob("*.py")):
                content = file.read_bytes()
                digest.update(f"{file.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()
