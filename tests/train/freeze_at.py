"""A program: a rank of a run that freezes or dies at a moment. python freeze_at.py CONFIG RANK MOMENT SIGNAL"""

import os
import sys
from typing import Any

from kdav_fast.cli import main  # it quiets torch, which the others load

# isort: split
from kdav_fast.checkpoint import folders as checkpoint_folders
from kdav_fast.train import loop, setup
from kdav_fast.train.checkpoints import Checkpoints
from kdav_fast.train.engine.engine import Engine

MOMENTS: dict[str, tuple[Any, str]] = {
    "looking at the images": (setup, "same_images"),
    "building loaders": (setup, "build_loaders"),
    "starting DeepSpeed": (Engine, "_initialize"),
    "restoring": (Checkpoints, "restore"),
    "measuring": (loop, "run_phases"),
    "gathering weights": (Checkpoints, "save"),
    "writing its files": (checkpoint_folders, "_write_all"),
    "evaluating": (loop, "evaluate_student"),
    "writing results": (loop, "write_results"),
}


def strike_at(moment: str, number: int) -> None:
    owner, name = MOMENTS[moment]
    original = getattr(owner, name)

    def struck(*arguments, **options):
        os.kill(os.getpid(), number)
        return original(*arguments, **options)

    setattr(owner, name, struck)


if __name__ == "__main__":
    config, rank, moment, number = sys.argv[1:]
    if os.environ["RANK"] == rank:
        strike_at(moment, int(number))
    sys.argv = ["kdav", "distill", config]
    sys.exit(main())
