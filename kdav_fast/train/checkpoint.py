"""Saving and restoring everything a run needs to continue as if it had never stopped."""

import base64
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kdav_fast.errors import InputError
from kdav_fast.student_file import CHECKPOINTS, FILE_NAME, write_student
from kdav_fast.train.distributed import Cluster

if TYPE_CHECKING:
    from kdav_fast.train.setup import Parts

_ENGINE = "engine"


def save_checkpoint(parts: "Parts", step: int) -> None:
    """Write `checkpoints/step-XXXXXXXX`: whole or not at all. Every rank must call this.

    DeepSpeed writes student, optimizer and schedule; beside them stand the distiller's state, the average
    weights and, for each rank, loader position and random state. The folder gets its name last.
    """
    cluster, folder = parts.cluster, parts.run_dir / CHECKPOINTS / f"step-{step:08d}"
    temporary = folder.with_name(folder.name + ".tmp")
    if cluster.is_first:
        for leftover in (temporary, folder):  # of a save that a crash interrupted
            if leftover.exists():
                shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    cluster.barrier()
    parts.engine.save_checkpoint(str(temporary), tag=_ENGINE)
    rank_state = {"loader": parts.loaders.train.state_dict(), "random": _random_state(cluster)}
    _rank_file(temporary, cluster).write_text(json.dumps(rank_state), encoding="utf-8")
    if cluster.is_first:
        write_student(temporary / FILE_NAME, parts.evaluated_student.weights(), parts.card(step))
        _save_state(parts.distiller, temporary / "distiller.safetensors")
        if parts.average is not None:
            _save_state(parts.average, temporary / "average.safetensors")
        (temporary / "state.json").write_text(
            json.dumps({"step": step, "world": cluster.world}), encoding="utf-8"
        )
    cluster.barrier()
    if cluster.is_first:
        temporary.rename(folder)
        for old in _saved(parts.run_dir)[: -parts.config.train.keep_checkpoints]:
            shutil.rmtree(old)
    cluster.barrier()


def restore_checkpoint(parts: "Parts") -> int:
    """Restore the newest checkpoint into `parts`; returns its step, 0 if there is none.

    Raises:
        InputError: it was written by another number of processes.
    """
    saved = _saved(parts.run_dir)
    if not saved:
        return 0
    folder, cluster = saved[-1], parts.cluster
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state["world"] != cluster.world:
        raise InputError(
            f"{folder} was written by {state['world']} processes and this run has {cluster.world}; "
            f"continue with {state['world']}, or start anew in another run_dir"
        )
    parts.engine.load_checkpoint(str(folder), tag=_ENGINE)
    device = str(cluster.device)
    parts.distiller.load_state_dict(load_file(folder / "distiller.safetensors", device=device))
    if parts.average is not None:
        parts.average.load_state_dict(load_file(folder / "average.safetensors", device=device))
    rank_state = json.loads(_rank_file(folder, cluster).read_text(encoding="utf-8"))
    parts.loaders.train.load_state_dict(rank_state["loader"])
    _restore_random_state(rank_state["random"], cluster)
    return state["step"]


def _save_state(module: nn.Module, file: Path) -> None:
    # safetensors knows no strides: channels_last weights are laid out anew.
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, file)


def _saved(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first: an interrupted save still has its temporary name."""
    return sorted(path for path in (run_dir / CHECKPOINTS).glob("step-*") if path.suffix != ".tmp")


def _rank_file(folder: Path, cluster: Cluster) -> Path:
    return folder / f"rank-{cluster.rank:05d}.json"


def _random_state(cluster: Cluster) -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if cluster.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(cluster.device)
    return {name: base64.b64encode(bytes(state.tolist())).decode("ascii") for name, state in states.items()}


def _restore_random_state(states: dict[str, Any], cluster: Cluster) -> None:
    decoded = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        for name, text in states.items()
    }
    torch.set_rng_state(decoded["cpu"])
    if "cuda" in decoded and cluster.device.type == "cuda":
        torch.cuda.set_rng_state(decoded["cuda"], cluster.device)
