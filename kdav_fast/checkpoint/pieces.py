"""Trained weights and their optimizer state in pieces: each rank saves those that it holds.

A piece is a stretch of one flattened parameter, named `KIND:PARAMETER:START`; of what is one number for a parameter,
such as a step count, `KIND:PARAMETER:value`. At ZeRO stage 0 every rank holds all, and they share the work; at the
higher stages each holds its shard. Any number of ranks, at any stage, puts any set of pieces together again, exactly.
This is the only file that looks into DeepSpeed's optimizers (0.19).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kdav_fast.errors import InputError
from kdav_fast.runtime.processes import Cluster

WEIGHT = "weight"
_VALUE = "value"
_GROUP = "group."


class Trained(Protocol):
    """What is trained, and how: an engine."""

    module: nn.Module
    zero_stage: int
    optimizer: torch.optim.Optimizer
    """The one that the user chose."""
    sharded: Any
    """DeepSpeed's around it; None at stage 0."""


class _Piece(NamedTuple):
    """Where a stretch of a parameter lies on this rank."""

    parameter: str
    start: int
    """In the flattened parameter."""
    length: int
    owner: Tensor
    """What the optimizer updates, and keeps its state for: the parameter itself, or a flat buffer of many."""
    offset: int
    """Where the stretch begins in `owner`."""

    def read(self, tensor: Tensor) -> Tensor:
        """The stretch of `owner` or of a state of the same shape; flat."""
        return tensor.detach().reshape(-1)[self.offset : self.offset + self.length]

    def write(self, tensor: Tensor, stretch: Tensor) -> None:
        if tensor.numel() == self.length:
            tensor.copy_(stretch.view(tensor.shape))  # whatever its memory format
        else:
            tensor.narrow(0, self.offset, self.length).copy_(stretch)


def training_state(engine: Trained, cluster: Cluster) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """This rank's pieces of weights and optimizer state, on the CPU, and what the optimizer keeps for its groups."""
    pieces = list(_pieces(engine, cluster))
    if engine.zero_stage == 0:
        pieces = pieces[cluster.rank :: cluster.world]
    tensors = {}
    for piece in pieces:
        for kind, value in {WEIGHT: piece.owner, **engine.optimizer.state.get(piece.owner, {})}.items():
            if not isinstance(value, Tensor):
                continue  # momentum that is switched off
            stretches = value.shape == piece.owner.shape
            saved = piece.read(value) if stretches else value.detach().reshape(())
            place = piece.start if stretches else _VALUE
            tensors[f"{kind}:{piece.parameter}:{place}"] = saved.to("cpu", copy=True)
    groups = engine.optimizer.param_groups
    for number, group in enumerate(groups):
        for name, value in group.items():
            # apex's NovoGrad keeps its norms here.
            if isinstance(value, list) and name != "params" and all(isinstance(t, Tensor) for t in value):
                for position, tensor in enumerate(value):
                    tensors[f"{_GROUP}{name}:{number}:{position}"] = tensor.detach().to("cpu", copy=True)
    return tensors, [{"step": group["step"]} if "step" in group else {} for group in groups]


@torch.no_grad()
def restore_training_state(
    engine: Trained, cluster: Cluster, files: Iterable[Path], groups: list[dict[str, Any]]
) -> None:
    """Put together what `training_state` gave on every rank of an earlier run.

    Args:
        engine: takes it over.
        cluster: this run's processes, as many as there may be.
        files: safetensors files of all ranks of the earlier run.
        groups: of any of them.

    Raises:
        InputError: a stretch of a parameter is in none of the files: they are of another student.
    """
    optimizer = engine.optimizer
    with ExitStack() as stack:
        saved = _SavedPieces([stack.enter_context(safe_open(file, "pt")) for file in files])
        for piece in _pieces(engine, cluster):
            piece.write(piece.owner, saved.stretch(WEIGHT, piece))
            for kind in saved.kinds(piece.parameter) - {WEIGHT}:
                kept = optimizer.state[piece.owner].setdefault(kind, torch.zeros_like(piece.owner))
                piece.write(kept, saved.stretch(kind, piece))
            for kind, value in saved.values(piece.parameter).items():
                # As torch wants it: beside the weights only for kernels that read it there.
                beside = any(
                    group.get("fused") or group.get("capturable") for group in optimizer.param_groups
                )
                optimizer.state[piece.owner][kind] = value.to(piece.owner.device) if beside else value
        for number, (group, counts) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
            group.update(counts)
            for name, tensors in saved.group(number).items():
                group[name] = [tensor.to(piece.owner.device) for tensor in tensors]
    _spread_weights(engine)


def _pieces(engine: Trained, cluster: Cluster) -> Iterator[_Piece]:
    zero = engine.sharded
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if engine.zero_stage == 0:
            yield _Piece(name, 0, parameter.numel(), parameter, 0)
        elif engine.zero_stage < 3:
            here = parameter._hp_mapping
            if here is not None:  # else other ranks have all of it
                flat = zero.single_partition_of_fp32_groups[here.param_group_index]
                whole, part = here.lp_fragment_address, here.hp_fragment_address
                yield _Piece(name, whole.start, whole.numel, flat, part.start)
        else:
            group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            start = length * cluster.rank  # every rank has as much, the last ones padding
            length = min(length, parameter.ds_numel - start)
            if length > 0:
                yield _Piece(name, start, length, zero.fp32_partitioned_groups_flat[group], offset)


def _spread_weights(engine: Trained) -> None:
    """From what the optimizer updates to what the network computes with."""
    zero = engine.sharded
    if engine.zero_stage in (1, 2):
        zero.update_lp_params()
    elif engine.zero_stage == 3:
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


class _SavedPieces:
    """The pieces in the files of all ranks."""

    def __init__(self, files: list) -> None:
        self._stretches = defaultdict(lambda: defaultdict(list))
        self._values = defaultdict(dict)
        self._groups = defaultdict(dict)
        for file in files:
            for key in file.keys():  # noqa: SIM118 (a file is not a dictionary)
                kind, name, place = key.rsplit(":", 2)
                if kind.startswith(_GROUP):
                    self._groups[int(name)][kind.removeprefix(_GROUP), int(place)] = file.get_tensor(key)
                elif place == _VALUE:
                    self._values[name][kind] = file.get_tensor(key)
                else:
                    self._stretches[name][kind].append((int(place), key, file))

    def kinds(self, parameter: str) -> set[str]:
        """What there is of a parameter's size."""
        return set(self._stretches[parameter])

    def values(self, parameter: str) -> dict[str, Tensor]:
        """What is one number for it, by kind."""
        return self._values[parameter]

    def group(self, number: int) -> dict[str, list[Tensor]]:
        """What the optimizer kept for a group of parameters."""
        found = defaultdict(list)
        for (name, _), tensor in sorted(self._groups[number].items(), key=lambda item: item[0]):
            found[name].append(tensor)
        return found

    def stretch(self, kind: str, wanted: _Piece) -> Tensor:
        """One kind of a piece, flat, out of all stretches that it meets."""
        parts, end = [], wanted.start
        for start, key, file in sorted(self._stretches[wanted.parameter][kind], key=lambda found: found[0]):
            stored = file.get_slice(key)
            last = min(start + stored.get_shape()[0], wanted.start + wanted.length)
            if start <= end < last:
                parts.append(stored[end - start : last - start])
                end = last
        if end < wanted.start + wanted.length:
            raise InputError(
                f"the checkpoint has no {kind} of {wanted.parameter} from element {end} on, so it is of another "
                "student; start a new run in another run_dir"
            )
        return torch.cat(parts)
