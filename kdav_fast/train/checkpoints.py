"""What a run needs to continue as if it had never stopped: what is saved, and how it is restored."""

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from kdav_fast.checkpoint.folders import CheckpointFolders
from kdav_fast.checkpoint.pieces import restore_training_state, training_state
from kdav_fast.errors import InputError
from kdav_fast.runtime.processes import Cluster
from kdav_fast.student.file import FILE_NAME, student_bytes
from kdav_fast.student.heads import EmbeddingHead

if TYPE_CHECKING:
    from kdav_fast.train.setup import Parts

_DISTILLER = "distiller.safetensors"
_AVERAGE = "average.safetensors"


def begin_checkpoint(folders: CheckpointFolders, parts: "Parts", step: int, score: float | None) -> None:
    """Start to save everything, as it is now; every rank must call this, and `folders.finish()` later.

    Each rank saves its pieces of weights and optimizer state, its own BatchNorm statistics, loader position and
    random state. What is the same on all ranks, the first one saves: distiller, average weights, and the student as
    it would be evaluated.

    Args:
        folders: where.
        parts: the run.
        step: optimizer steps done.
        score: accuracy of this student, if it was measured.
    """
    cluster = parts.cluster
    pieces, groups = training_state(parts.engine, cluster)
    rank_state = {
        "loader": parts.loaders.train.state_dict(),
        "random": _random_state(cluster),
        "optimizer_groups": groups,
    }
    contents = {
        _pieces_file(cluster.rank): save(pieces),
        _buffers_file(cluster.rank): save(_portable(dict(_buffers(parts)))),
        _rank_file(cluster.rank): json.dumps(rank_state).encode(),
    }
    with parts.savable():
        weights = parts.evaluated_student.weights()
    if cluster.is_first:
        contents[FILE_NAME] = student_bytes(weights, parts.card(step))
        contents[_DISTILLER] = save(_portable(parts.distiller.state_dict()))
        if parts.average is not None:
            contents[_AVERAGE] = save(_portable(parts.average.state_dict()))
    facts = {
        "world": cluster.world,
        "score": score,
        "loss_scale": parts.engine.loss_scale.state_dict(),
        "skipped_steps": parts.skipped_steps,
    }
    folders.begin(step, contents, facts)


def restore_checkpoint(folders: CheckpointFolders, parts: "Parts") -> int | None:
    """Restore the newest intact checkpoint into `parts`; returns its step, None if there is none.

    Another number of processes may continue it with `data.on_reshard=restart_epoch`: weights, optimizer and memory are
    exact; BatchNorm statistics are the mean over its ranks; the loaders begin its epoch anew, and the random states of
    mixing follow from seed, step and rank.

    Raises:
        InputError: all checkpoints are damaged, or the newest intact one is of another form, or was written by another
            number of processes and that is not allowed.
    """
    found = folders.newest_intact()
    if found is None:
        return None
    folder, manifest = found
    try:
        _restore(folder, manifest, parts)
    except (SafetensorError, UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
        raise InputError(
            f"{folder} is what its manifest says, but no checkpoint that this version can read ({_one_line(error)}); "
            "remove it to continue from an earlier one, or start anew in another run_dir"
        ) from None
    return manifest["step"]


def _restore(folder: Path, manifest: dict[str, Any], parts: "Parts") -> None:
    def verified(name: str) -> Path:
        if name not in manifest["files"]:
            raise KeyError(f"{name} is not in the manifest")
        return folder / name

    written_by, cluster = manifest["world"], parts.cluster
    resharded = written_by != cluster.world
    if resharded and parts.config.data.on_reshard == "refuse":
        raise InputError(
            f"{folder} was written by {written_by} processes and this run has {cluster.world}; continue with "
            f"{written_by}, set data.on_reshard=restart_epoch, or start anew in another run_dir"
        )
    # What the loaders and the optimizer need of another number of ranks, the first one's file tells as well.
    rank = 0 if resharded else cluster.rank
    rank_state = json.loads(verified(_rank_file(rank)).read_text(encoding="utf-8"))
    pieces = [verified(_pieces_file(rank)) for rank in range(written_by)]
    restore_training_state(parts.engine, cluster, pieces, rank_state["optimizer_groups"])
    parts.engine.restore_loss_scale(manifest["loss_scale"])
    parts.skipped_steps = manifest["skipped_steps"]
    device = str(cluster.device)
    parts.distiller.load_state_dict(load_file(verified(_DISTILLER), device=device))
    if parts.average is not None:
        parts.average.load_state_dict(load_file(verified(_AVERAGE), device=device))
    buffers = [verified(_buffers_file(rank)) for rank in (range(written_by) if resharded else [rank])]
    _restore_buffers(parts, buffers)
    parts.engine.remember_statistics()
    parts.loaders.train.load_state_dict(rank_state["loader"])
    if resharded:
        entropy = (parts.config.train.seed, manifest["step"], cluster.rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        cluster.say(
            f"{folder} was written by {written_by} processes; {cluster.world} continue it, beginning its epoch anew"
        )
    else:
        _restore_random_state(rank_state["random"], cluster)


def _buffers(parts: "Parts") -> list[tuple[str, Tensor]]:
    """Every buffer of the student and of its average: BatchNorm's, and the head's centre and class sums."""
    named = list(parts.student.named_buffers(prefix="student"))
    if parts.average is not None:
        named += parts.average.named_buffers(prefix="average")
    return named


@torch.no_grad()
def _restore_buffers(parts: "Parts", files: list[Path]) -> None:
    """This rank's own, or out of all ranks of another number of processes."""
    saved = [load_file(file) for file in files]
    for name, buffer in _buffers(parts):
        values = torch.stack([state[name] for state in saved])
        if len(saved) == 1 or not buffer.is_floating_point():
            buffer.copy_(values[0])
        elif name.endswith(EmbeddingHead.SUMS):
            buffer.copy_(values.sum(0) / parts.cluster.world)  # so that the sum over ranks stays what it was
        else:
            buffer.copy_(values.mean(0))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _portable(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors takes it: it knows no strides."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _pieces_file(rank: int) -> str:
    return f"pieces-{rank:05d}.safetensors"


def _buffers_file(rank: int) -> str:
    return f"buffers-{rank:05d}.safetensors"


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


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
