"""The processes of a run: who they are, what each does for all, and how an error on one reaches all."""

import atexit
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from kdav_fast.errors import InputError, RankLostError
from kdav_fast.runtime.agreement import code_facts, difference
from kdav_fast.runtime.liveness import Liveness
from kdav_fast.runtime.meeting import Meeting
from kdav_fast.runtime.say import say

T = TypeVar("T")
# Of control messages: long enough for rank 0 to scan a large data set on a slow file system while the others wait.
# Whether it is still there, `Liveness` watches meanwhile.
TIMEOUT = timedelta(hours=24)
_MARGIN = 30.0
"""Seconds; the watch takes half of them."""
_TELLING = 60.0
"""Seconds for processes that still import to come and hear that the run cannot begin."""


@dataclass(frozen=True)
class Cluster:
    """This process among the processes of the run."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    control: dist.ProcessGroup | None = field(repr=False, default=None)
    """A gloo group for messages between hosts' CPUs: waiting on it never waits for a device."""
    liveness: Liveness = field(repr=False, default_factory=lambda: Liveness(0, 1))
    """Who of them still answers."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line once for all ranks."""
        if self.is_first:
            say(text)

    def on_first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 while the others wait; all get its result, or its InputError."""
        outcome: list[tuple[bool, T | str] | None] = [None]
        if self.is_first:
            try:
                outcome[0] = (True, action())
            except InputError as error:
                outcome[0] = (False, str(error))
        if self.world > 1:
            dist.broadcast_object_list(outcome, src=0, group=self.control)
        succeeded, value = outcome[0]
        if not succeeded:
            raise InputError(value)
        return value

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[T] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    @property
    def names(self) -> list[str]:
        """Every process with its host and number, in rank order: for messages."""
        return self.liveness.names

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raise `InputError` on every rank, naming what differs, unless all have the same facts."""
        unlike = difference(list(zip(self.names, self.gather(facts), strict=True)))
        if unlike:
            raise InputError(unlike)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def begin_sum(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """`sum` that is under way while the device works on; what is returned waits for it and gives it."""
        work = dist.all_reduce(tensor, async_op=True) if self.world > 1 else None

        def finish() -> torch.Tensor:
            if work is not None:
                work.wait()
            return tensor

        return finish

    @torch.no_grad()
    def sum_each(self, tensors: Iterable[torch.Tensor]) -> None:
        """`sum` of many tensors of one device, alike in number and shapes on all ranks: one message a dtype."""
        if self.world == 1:
            return
        of_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors:
            of_dtype.setdefault(tensor.dtype, []).append(tensor)
        for parts in of_dtype.values():
            whole = self.sum(torch.cat([part.reshape(-1) for part in parts]))
            for part, total in zip(parts, whole.split([part.numel() for part in parts]), strict=True):
                part.copy_(total.view(part.shape))

    @torch.no_grad()
    def average_each(self, tensors: Iterable[torch.Tensor]) -> None:
        """Make many tensors their means over all ranks, as `sum_each` does."""
        tensors = list(tensors)
        if self.world > 1:
            self.sum_each(tensors)
            for tensor in tensors:
                tensor.div_(self.world)

    @contextmanager
    def averaged_buffers(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Inside, every rank holds the mean of all ranks' floating-point buffers; then its own again.

        Each rank's BatchNorm statistics come from its own share of the batch. The head's class sums become means
        over ranks too, which leaves every prototype where it was.
        """
        buffers = [buffer for module in modules for buffer in module.buffers() if buffer.is_floating_point()]
        own = [buffer.clone() for buffer in buffers]
        self.average_each(buffers)
        yield
        for buffer, value in zip(buffers, own, strict=True):
            buffer.copy_(value)


_meeting: Meeting | None = None
"""Of this process, for all its runs: the port of rank 0 is one."""


def start_cluster(
    device: str, comm_timeout: float = 1800.0, facts: Mapping[str, str] | None = None
) -> Cluster:
    """Join the run's processes, as the launcher's environment describes them; alone without a launcher.

    Args:
        device: "auto", "cpu" or "cuda".
        comm_timeout: seconds to wait for the others to come, and that a collective of the training steps may take.
        facts: what all of them must have alike, values by what they are of.

    Raises:
        InputError: "cuda" where there is none, an environment that makes no sense, or unlike facts.
        RankLostError: another process did not come.
    """
    rank, world = _place()
    local_rank = _number("LOCAL_RANK", 0)
    local_world = _number("LOCAL_WORLD_SIZE", _number("LOCAL_SIZE", world))
    liveness = _liveness(rank, world, comm_timeout)
    with liveness.naming_lost_ranks(stay=True):
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError(
                "device is 'cuda' but torch sees no GPU; set device=cpu, or run 'kdav doctor' to see why"
            )
        kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        place = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise InputError(
                    f"LOCAL_RANK is {local_rank} but torch sees {torch.cuda.device_count()} GPUs; start fewer processes"
                )
            torch.cuda.set_device(place)
        if world == 1:
            if not dist.is_initialized():
                # A store in this process: it needs no port, and two runs on a host do not collide.
                dist.init_process_group(**_backend(place), store=dist.HashStore(), rank=0, world_size=1)
            return Cluster(rank, world, local_rank, local_world, place, None, liveness)
        everybody = {"WORLD_SIZE": str(world), "the device": kind, **code_facts(), **(facts or {})}
        store = liveness.meet(everybody, comm_timeout)
        if not dist.is_initialized():
            timeout = collective_timeout(comm_timeout)
            dist.init_process_group(
                **_backend(place), store=store, rank=rank, world_size=world, timeout=timeout
            )
        control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return Cluster(rank, world, local_rank, local_world, place, control, liveness)


def _backend(device: torch.device) -> dict[str, Any]:
    """For torch's process group: NCCL meets at once, so that what is wrong with it is said where the run begins."""
    return {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}


def collective_timeout(comm_timeout: float) -> timedelta:
    """What torch's groups get: the run's own watch comes first, since NCCL's ends a process without a word."""
    return timedelta(seconds=comm_timeout + _MARGIN)


def _liveness(rank: int, world: int, timeout: float, patience: float = 10.0) -> Liveness:
    global _meeting
    if world > 1 and _meeting is None:
        # Run after what `Liveness` registers: of a group with a lost process, it would wait for hours.
        atexit.register(_leave_group)
        _meeting = Meeting(rank, world, timeout)
    return Liveness(rank, world, _meeting, silence=timeout, patience=patience)


def _place() -> tuple[int, int]:
    """RANK and WORLD_SIZE; raises `InputError` where they make no sense."""
    rank, world = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if rank >= world:
        raise InputError(f"RANK is {rank} and WORLD_SIZE is {world}; ranks are 0 to WORLD_SIZE - 1")
    return rank, world


def _leave_group() -> None:
    """Otherwise gloo's threads may abort the interpreter's exit and spoil the exit code."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"\s*[0-9]{1,7}\s*", text):
        raise InputError(f"{name} is {text!r}; it must be a whole number, as a launcher sets it")
    return int(text)


def tell_the_others(error: InputError) -> None:
    """For a process that cannot even join the run: leave the reason for those that wait for it.

    Where rank 0 cannot be reached, `error.told` becomes False: then nobody else will print it.
    """
    if _meeting is not None:
        return
    error.told = os.environ.get("RANK", "0") == "0"
    # The environment makes no sense, the port is another run's, or nobody is there.
    with suppress(InputError, RankLostError):
        rank, world = _place()
        if world == 1:
            return
        liveness = _liveness(rank, world, _TELLING, _TELLING)
        with suppress(InputError), liveness.naming_lost_ranks():
            raise error
        liveness.close()
        error.told = error.told or liveness.told
