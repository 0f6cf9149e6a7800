"""A program: trains a config, asks itself to stop after some step, and shows what it restored at its start.

python train_until.py CONFIG STEP FOLDER
"""

import os
import signal
import sys
from pathlib import Path

from safetensors.torch import save_file

from kdav_fast.checkpoint.pieces import training_state
from kdav_fast.cli import main
from kdav_fast.tracking.status import StatusLine
from kdav_fast.train import loop


def stop_after(last: int) -> None:
    """Send this process SIGTERM when the step is done."""
    advance, train = StatusLine.advance, loop.train
    step = 0

    def training(run, first, *others):
        nonlocal step
        step = first
        return train(run, first, *others)

    def advancing(self):
        nonlocal step
        advance(self)
        step += 1
        if step == last and os.environ["RANK"] == "0":
            signal.raise_signal(signal.SIGTERM)

    StatusLine.advance, loop.train = advancing, training


def show_restored(folder: Path) -> None:
    """Write this rank's pieces and memory to `folder` as they are after restoring."""
    train = loop.train

    def training(run, *others):
        rank = os.environ["RANK"]
        folder.mkdir(exist_ok=True)
        save_file(training_state(run.engine, run.cluster)[0], folder / f"pieces-{rank}.safetensors")
        save_file(run.distiller.state_dict(), folder / f"distiller-{rank}.safetensors")
        return train(run, *others)

    loop.train = training


if __name__ == "__main__":
    file, step, folder = sys.argv[1:]
    stop_after(int(step))
    show_restored(Path(folder))
    sys.exit(main(["distill", file]))
