"""Saving and restoring everything a run needs to continue as if it had never stopped."""

import base64
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
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
    _rank_file(temporary, cluster.rank).write_text(json.dumps(rank_state), encoding="utf-8")
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

    With `data.on_reshard=restart_epoch`, a checkpoint of another number of processes is continued too: the
    loaders begin its epoch anew, and the random states of mixing follow from seed, step and rank.

    Raises:
        InputError: it was written by another number of processes and that is not allowed.
    """
    saved = _saved(parts.run_dir)
    if not saved:
        return 0
    folder, cluster = saved[-1], parts.cluster
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    resharded = state["world"] != cluster.world
    if resharded:
        _require_resharding(parts, folder, state["world"])
    parts.engine.load_checkpoint(str(folder), tag=_ENGINE)
    device = str(cluster.device)
    parts.distiller.load_state_dict(load_file(folder / "distiller.safetensors", device=device))
    if parts.average is not None:
        parts.average.load_state_dict(load_file(folder / "average.safetensors", device=device))
    # What the loaders need of another number of ranks, the first one's file tells as well.
    rank_file = _rank_file(folder, 0 if resharded else cluster.rank)
    rank_state = json.loads(rank_file.read_text(encoding="utf-8"))
    parts.loaders.train.load_state_dict(rank_state["loader"])
    if resharded:
        entropy = (parts.config.train.seed, state["step"], cluster.rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        cluster.say(
            f"{folder} was written by {state['world']} processes; {cluster.world} continue it, beginning its epoch anew"
        )
    else:
        _restore_random_state(rank_state["random"], cluster)
    return state["step"]


def _require_resharding(parts: "Parts", folder: Path, written_by: int) -> None:
    here, train = parts.cluster.world, parts.config.train
    message = (
        f"{folder} was written by {written_by} processes and this run has {here}; continue with {written_by}"
    )
    if train.zero_stage > 0:
        raise InputError(
            f"{message}: with train.zero_stage={train.zero_stage} each holds a part of the optimizer"
        )
    if parts.config.data.on_reshard == "refuse":
        raise InputError(f"{message}, set data.on_reshard=restart_epoch, or start anew in another run_dir")


def _save_state(module: nn.Module, file: Path) -> None:
    # safetensors knows no strides: channels_last weights are laid out anew.
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, file)


def _saved(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first: an interrupted save still has its temporary name."""
    return sorted(path for path in (run_dir / CHECKPOINTS).glob("step-*") if path.suffix != ".tmp")


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


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
