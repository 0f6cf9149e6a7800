"""All that a run does before its first optimizer step, and what it found; nothing is written."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from kdav_fast.config import Config
from kdav_fast.errors import InputError
from kdav_fast.runtime.precision import dtype_name
from kdav_fast.runtime.processes import Cluster, start_cluster
from kdav_fast.train.checkpoints import Checkpoints, Position
from kdav_fast.train.folder.beginning import settled_config
from kdav_fast.train.folder.config import config_facts
from kdav_fast.train.folder.extension import extension_line, is_complete
from kdav_fast.train.run import Run
from kdav_fast.train.setup import naming_sizes, set_up
from kdav_fast.train.step import MicroBatch, find_gradients

_MIB = 2**20


def check_training(config: Config, extend: bool = False) -> None:
    """Set a run up, restore what its folder holds, and take one batch through teacher, student, loss and backward.

    Prints a line for each thing found. Every process of the run must call this. No file in `run_dir` changes, and
    the folder is neither made nor locked: it may be that of a run at work.

    Args:
        config: of the run.
        extend: as in `run_training`.

    Raises:
        InputError: whatever would stop the run before its first step, and a first batch whose loss is not finite.
    """
    cluster = start_cluster(config.device, config.train.comm_timeout, config_facts(config))
    with naming_sizes(config.distiller), cluster.liveness.naming_lost_ranks():
        cluster.on_first(lambda: _require_writable(config.run_dir))
        config, extended = settled_config(config, cluster, extend)
        if cluster.on_first(lambda: is_complete(config)):
            cluster.say(f"run_dir: {config.run_dir} is complete; there is nothing to do")
            return
        run = set_up(config, cluster)
        for line in _set_up_lines(run):
            cluster.say(line)
        position = Checkpoints(run, read_only=True).restore()
        step = None if position is None else position.step
        if step is None:
            run.start_engine()
        run.trainee.train()
        seen = find_gradients(run, iter(run.loaders.train), step or 0)
        cluster.say(_batch_line(seen, run))
        if run.first_answers is not None:
            run.first_answers.tell()
        cluster.say(f"run_dir: {_start_line(run, position)}")
        if step and extended:
            cluster.say(extension_line(config, extended, step, run.steps))
        cluster.say("checked; nothing was written")


def _require_writable(run_dir: Path) -> None:
    """Raise `InputError` unless the folder can be written or made."""
    place = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "it cannot be written" if place.is_dir() else "it is no folder"
        raise InputError(f"run_dir {run_dir}: of {place}, {why}; give a folder that can be written")


def _set_up_lines(run: Run) -> Iterator[str]:
    config, train = run.config, run.config.train
    images, loaders = run.loaders.train.images_per_epoch, run.loaders
    yield (
        f"data: {images:,} training and {loaders.evaluation.images_per_epoch:,} evaluation images, "
        f"{len(loaders.classes):,} classes, {config.data.image_size} pixels"
    )
    yield f"model: {config.model.name}, {_parameters(run.student)}"
    if run.teacher is not None:
        yield f"teacher: {config.teacher.name}, {_parameters(run.teacher)}"
    if kept := sum(buffer.nbytes for buffer in run.distiller.buffers()):
        yield f"distiller: {config.distiller.name}, {kept / _MIB:.1f} MiB of memory"
    precision = dtype_name(run.dtype)
    yield (
        f"run: {run.steps:,} steps, {train.epochs:g} epochs of {run.steps_per_epoch:g}; batches of "
        f"{train.batch_size:,} over {run.cluster.world} process{'es' * (run.cluster.world > 1)}; {precision} on "
        f"{run.cluster.device.type}, ZeRO stage {train.zero_stage}"
    )


def _parameters(network: nn.Module) -> str:
    # What ZeRO-3 has sharded says itself how large it is.
    count = sum(getattr(p, "ds_numel", p.numel()) for p in network.parameters())
    return f"{count:,} parameters"


def _batch_line(seen: list[MicroBatch], run: Run) -> str:
    """The first batch's loss on all ranks; raises `InputError` if it is not finite."""
    loss = torch.stack([micro.answer.total.detach().double() for micro in seen]).mean()
    loss = run.cluster.sum(loss).item() / run.cluster.world
    if not torch.isfinite(torch.tensor(loss)):
        raise InputError(
            f"the loss of the first batch is {loss}; look at the teacher's weights, the normalisation of the images "
            "and train.precision"
        )
    return f"first batch: loss {loss:.4g}; {_peak_memory(run.cluster)}"


def _peak_memory(cluster: Cluster) -> str:
    """Before the optimizer has state: its momentum or moments come on top."""
    if cluster.device.type == "cuda":
        peak, where = torch.cuda.max_memory_allocated(cluster.device), "on the GPU"
    else:
        peak, where = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "of the first process"
    return f"at most {peak / _MIB:,.0f} MiB {where} so far, without the optimizer's state"


def _start_line(run: Run, position: Position | None) -> str:
    run_dir = run.run_dir
    if position is not None and position.step is None:
        return f"{run_dir} would be continued in what comes before distillation"
    if position is not None:
        return f"{run_dir} would be continued after step {position.step} of {run.steps}"
    return f"{run_dir} {'holds nothing to continue from' if run_dir.exists() else 'would be made'}; the run would begin"
