"""A program: trains a config, but on one rank something is not a number in some micro-batches.

    python poisoned_run.py CONFIG images|teacher|loss RANK [STEP,...] [LAST]

`images` are those that the student sees; of the `teacher`'s outputs, one row is poisoned; steps count from 1. Each
process kills itself after LAST steps of its own.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest

from kdav_fast.cli import main
from kdav_fast.distillers.kdav import KDAV
from kdav_fast.teachers.frozen import FrozenTeacher
from kdav_fast.train.engine.engine import Engine
from tests.train.interrupt import after_step

NAN = float("nan")


def poison(owner: type, method: str, steps: list[int], change: Callable[[Any], Any], result: bool) -> None:
    """Change the first argument of a method, or its result, in some of its calls."""
    original, calls = getattr(owner, method), 0

    def poisoned(self, first, *others):
        nonlocal calls
        calls += 1
        if calls not in steps:
            return original(self, first, *others)
        return change(original(self, first, *others)) if result else original(self, change(first), *others)

    setattr(owner, method, poisoned)


def poison_loss(steps: list[int]) -> None:
    """In the run's steps of these numbers, wherever it was continued."""
    forward = KDAV.forward

    def poisoned(self, student, teacher, batch, learned, progress, *begun):
        losses = forward(self, student, teacher, batch, learned, progress, *begun)
        return losses._replace(total=losses.total * NAN) if progress.step + 1 in steps else losses

    KDAV.forward = poisoned


def kill_after(steps: int) -> None:
    """This process, without a word."""
    after_step(pytest.MonkeyPatch(), steps, lambda: os.kill(os.getpid(), signal.SIGKILL))


def poison_images(batch):
    return batch._replace(images=batch.images * NAN)


def poison_first_row(outputs):
    outputs.features[0] = NAN
    return outputs


if __name__ == "__main__":
    file, what, rank, steps, *last = sys.argv[1:]
    for number in last:
        kill_after(int(number))
    if os.environ["RANK"] == rank:
        steps = json.loads(steps)
        match what:
            case "images":
                poison(Engine, "__call__", steps, poison_images, result=False)
            case "teacher":
                poison(FrozenTeacher, "forward", steps, poison_first_row, result=True)
            case "loss":
                poison_loss(steps)
    sys.exit(main(["distill", file]))
