"""Reading weights from a file that somebody else may have written: tensors only, never code."""

import argparse
import os
import pickle
import re
import stat
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdav_fast.errors import InputError, listed, one_line

# Where the usual training scripts put the weights in what they save; the first one found is taken.
WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict", "net", "state_dict_ema")
# What DistributedDataParallel and torch.compile put in front of every name.
PREFIXES = ("module.", "_orig_mod.")


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors or torch file onto the CPU; the content decides which, not the name.

    A torch file may hold the state dict itself or one level deeper under a usual key, and its names may carry
    the prefixes of DistributedDataParallel and torch.compile. Where a file holds plain and averaged (EMA)
    weights, the plain ones are taken.

    Returns:
        The tensors by name, and the safetensors metadata (empty for a torch file).

    Raises:
        InputError: no such file, not a checkpoint, a damaged one, a pickle that holds more than data, or a tensor that
            no network can compute with: sparse or quantized, not finite in float32, or a negative variance.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe would be waited for, and read once only
            raise InputError(f"weights {path} is a pipe or a device; give a safetensors or torch file")
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise InputError(
            f"weights {path}: {error.strerror}; give the path of a safetensors or torch file"
        ) from None
    # A safetensors file is eight bytes of length, then JSON.
    if head[8:] == b"{":
        tensors, metadata = _load_safetensors(path)
    else:
        tensors, metadata = _unwrap(_load_torch(path, head), path), {}
    _require_usable(tensors, path)
    return tensors, metadata


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _strip_prefixes(tensors), dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"weights {path} is not a whole safetensors file ({one_line(error)}); copy it again"
        ) from None


def _load_torch(path: Path, head: bytes) -> Any:
    try:
        damaged = _damaged_part(path)
        # timm and other scripts save their command line beside the weights; a namespace is only data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader fails in as many ways as there are broken files
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused or (isinstance(error, pickle.UnpicklingError) and head[:1] == b"\x80"):
            found = f" ({refused[1]})" if refused else ""
            raise InputError(
                f"weights {path} is refused: its pickle contains code or objects that are not tensors{found} "
                "and reading it could run them; save the state dict alone, best as safetensors"
            ) from None
        raise InputError(
            f"weights {path} is not a checkpoint that can be read; give a safetensors or torch file"
        ) from None
    if damaged:
        raise InputError(f"weights {path} is damaged: {damaged} in it has not its check sum; copy it again")
    return content


def _damaged_part(path: Path) -> str | None:
    """The first part of a zipped torch file with other content than was written; torch does not look at check sums."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        # Who saves with torch.serialization.set_crc32_options(False) leaves all of them 0.
        return archive.testzip() if any(part.CRC for part in archive.infolist()) else None


def _require_usable(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "has no values" if tensor.is_meta else "is sparse or quantized"
            raise InputError(f"weights {path}: {name} {kind}; give a checkpoint of plain tensors")
        if not tensor.is_floating_point():
            continue
        values = tensor.float()  # what networks compute in: a float64 may lie beyond its range
        if (count := int((~values.isfinite()).sum())) > 0:
            raise InputError(
                f"weights {path}: {name} holds {count:,} of {tensor.numel():,} values that are not finite in float32, "
                "as a training that diverged leaves them; give another checkpoint"
            )
        if name.endswith("running_var") and tensor.numel() and values.min() < 0:
            raise InputError(f"weights {path}: {name} holds a negative variance; give another checkpoint")


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict):
        for candidate in (content, *(content.get(key) for key in WRAPPERS)):
            if _is_state_dict(candidate):
                return _strip_prefixes(candidate)
    held = f"a {type(content).__name__}"
    if isinstance(content, dict):
        held = f"a dict with {listed(list(map(repr, content)), 3) or 'no keys'}"
    raise InputError(
        f"weights {path} holds {held}, not a state dict; a state dict, or one under "
        f"{', '.join(repr(key) for key in WRAPPERS)}, can be read"
    )


def _is_state_dict(candidate: Any) -> bool:
    if not isinstance(candidate, dict) or not candidate:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in candidate.items())


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES * 2:  # either can stand before the other
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)
