"""Stopping early without losing work: a signal to any rank stops all of them at the same step."""

import signal
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

from kdav_fast.runtime.interrupts import STOPPED as STOPPED
from kdav_fast.runtime.interrupts import ends_at_once, heeded
from kdav_fast.runtime.processes import Cluster


class StopRequest:
    """Listens for the signals that stop a run; a SIGINT after one of them interrupts at once.

    Use as a context manager around the loop; the previous handlers come back afterwards.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._requested = False
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._receive) for number in heeded()}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None and exception[0] is None:  # else others may not answer any more
            self._pending[1].wait()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT and not ends_at_once():
            raise KeyboardInterrupt
        self._requested = True

    def agreed(self, writing: bool = False) -> tuple[bool, bool]:
        """What holds for any rank: it was asked to stop; it is still writing a checkpoint.

        Every rank must ask once a step. Over several ranks the answer is that of the step before, so that no step
        waits for the network.

        Args:
            writing: whether this rank is.
        """
        if self._cluster.world == 1:
            return self._requested, writing
        answer = (False, True)
        if self._pending is not None:
            votes, work = self._pending
            work.wait()
            answer = tuple(bool(vote) for vote in votes.tolist())
        votes = torch.tensor([int(self._requested), int(writing)])
        work = dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._cluster.control, async_op=True)
        self._pending = (votes, work)
        return answer
