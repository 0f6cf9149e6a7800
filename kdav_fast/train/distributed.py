"""The processes of a run: who they are, what each does for all, and how an error on one reaches all."""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from kdav_fast.errors import InputError
from kdav_fast.runtime.say import say

T = TypeVar("T")
# Of control messages: long enough for rank 0 to scan a large data set on a slow file system while the others wait.
TIMEOUT = timedelta(minutes=30)


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

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    @torch.no_grad()
    def average_buffers(self, module: nn.Module) -> None:
        """Make every rank hold the mean of all ranks' floating-point buffers.

        Each rank's BatchNorm statistics come from its own share of the batch. The head's class sums become means
        over ranks too, which leaves every prototype where it was.
        """
        if self.world > 1:
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    self.sum(buffer).div_(self.world)

    @contextmanager
    def averaged_buffers(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """`average_buffers` while inside; then each rank has its own again, as if nobody had looked."""
        modules = list(modules)
        own = [[buffer.clone() for buffer in module.buffers()] for module in modules]
        for module in modules:
            self.average_buffers(module)
        yield
        for module, kept in zip(modules, own, strict=True):
            for buffer, value in zip(module.buffers(), kept, strict=True):
                buffer.copy_(value)


def start_cluster(device: str, comm_timeout: float = 1800.0) -> Cluster:
    """Join the run's processes, as the launcher's environment describes them; alone without a launcher.

    Args:
        device: "auto", "cpu" or "cuda".
        comm_timeout: seconds that a collective of the training steps may take.

    Raises:
        InputError: "cuda" where there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device is 'cuda' but torch sees no GPU; set device=cpu, or run 'kdav doctor' to see why"
        )
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world)))
    place = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    backend = "nccl" if kind == "cuda" else "gloo"
    if not dist.is_initialized():
        if world == 1:
            # A store in this process: a single process needs no port, and two runs on a host do not collide.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, timeout=timedelta(seconds=comm_timeout))
            # Otherwise gloo's threads may abort the interpreter's exit and spoil the exit code.
            atexit.register(dist.destroy_process_group)
    control = dist.new_group(backend="gloo", timeout=TIMEOUT) if world > 1 else None
    return Cluster(rank, world, local_rank, local_world, place, control)
