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
    advance, restore = StatusLine.advance, loop.restore_checkpoint
    step = 0

    def restored(folders, parts):
        nonlocal step
        found = restore(folders, parts)
        step = found or 0
        return found

    def advancing(self):
        nonlocal step
        advance(self)
        step += 1
        if step == last and os.environ["RANK"] == "0":
            signal.raise_signal(signal.SIGTERM)

    StatusLine.advance, loop.restore_checkpoint = advancing, restored


def show_restored(folder: Path) -> None:
    """Write this rank's pieces and memory to `folder` as they are after restoring."""
    restore = loop.restore_checkpoint

    def restored(folders, parts):
        found = restore(folders, parts)
        rank = os.environ["RANK"]
        folder.mkdir(exist_ok=True)
        save_file(training_state(parts.engine, parts.cluster)[0], folder / f"pieces-{rank}.safetensors")
        save_file(parts.distiller.state_dict(), folder / f"distiller-{rank}.safetensors")
        return found

    loop.restore_checkpoint = restored


if __name__ == "__main__":
    file, step, folder = sys.argv[1:]
    stop_after(int(step))
    show_restored(Path(folder))
    sys.exit(main(["distill", file]))
