"""A program: trains a config, but on one rank something is not a number in some micro-batches.

    python poisoned_run.py CONFIG images|teacher|loss RANK [STEP,...]

`images` are those that the student sees; of the `teacher`'s outputs, one row is poisoned; steps count from 1.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from kdav_fast.cli import main
from kdav_fast.distillers.kdav import KDAV
from kdav_fast.teachers.frozen import FrozenTeacher
from kdav_fast.train.engine.engine import Engine

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


def poison_images(batch):
    return batch._replace(images=batch.images * NAN)


def poison_first_row(outputs):
    outputs.features[0] = NAN
    return outputs


if __name__ == "__main__":
    file, what, rank, steps = sys.argv[1:]
    if os.environ["RANK"] == rank:
        steps = json.loads(steps)
        match what:
            case "images":
                poison(Engine, "__call__", steps, poison_images, result=False)
            case "teacher":
                poison(FrozenTeacher, "forward", steps, poison_first_row, result=True)
            case "loss":
                poison(
                    KDAV,
                    "forward",
                    steps,
                    lambda losses: losses._replace(total=losses.total * NAN),
                    result=True,
                )
    sys.exit(main(["distill", file]))
