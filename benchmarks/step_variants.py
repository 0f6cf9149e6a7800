"""Other ways to take the package's step on one batch in memory, measured beside the run's engine.

What they are for: whether DeepSpeed at stage 0 costs anything over a plain module and over DistributedDataParallel, and
whether a teacher on a CUDA stream of its own gains anything. None of them looks for gradients that are not finite.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdav_fast.data import Batch
from kdav_fast.models.outputs import Outputs
from kdav_fast.runtime.memory_format import set_layout
from kdav_fast.train.optimizer import build_optimizer
from kdav_fast.train.run import Run

Step = Callable[[Batch], Tensor]
"""Trains on a batch; returns the loss, detached."""


class Variant(NamedTuple):
    build: Callable[[Run], Step]
    """From a run whose engine is not started."""
    only_on_gpu: bool = False


def _plain_module(run: Run, wrap: Callable[[nn.Module], nn.Module] = lambda trainee: trainee) -> Step:
    return _step(run, wrap(_laid_out(run)), run.teacher)


def _data_parallel(run: Run) -> Step:
    device = run.cluster.device
    places = [device.index or 0] if device.type == "cuda" else None
    how = {"device_ids": places, "broadcast_buffers": False, "gradient_as_bucket_view": True}
    return _plain_module(run, partial(DistributedDataParallel, **how))


def _teacher_stream(run: Run) -> Step:
    """The teacher's forward pass beside the student's, which waits before its loss."""
    side = torch.cuda.Stream()

    def teacher(batch: Batch) -> Outputs:
        side.wait_stream(
            torch.cuda.current_stream()
        )  # which made the batch, and has done with the last answer
        with torch.cuda.stream(side):
            return run.teacher(batch)

    run.student.register_forward_hook(lambda *_: torch.cuda.current_stream().wait_stream(side))
    return _step(run, _laid_out(run), teacher)


VARIANTS = {
    "plain module": Variant(_plain_module),
    "DistributedDataParallel": Variant(_data_parallel),
    "teacher on a stream of its own": Variant(_teacher_stream, only_on_gpu=True),
}


def _laid_out(run: Run) -> nn.Module:
    set_layout(run.trainee, run.config.data.layout, run.cluster.device)
    return run.trainee


def _step(run: Run, trainee: nn.Module, teacher: Callable[[Batch], Outputs]) -> Step:
    optimizer = build_optimizer(run.config.optimizer, run.trainee, run.learned)
    progress, rate = run.progress(0), run.lr(0)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)

    def step(batch: Batch) -> Tensor:
        answer = trainee(batch, teacher(batch), progress, _no_clock)
        answer.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return answer.total.detach()

    return step


def _no_clock(part: str) -> AbstractContextManager[None]:
    return nullcontext()
