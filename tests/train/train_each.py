"""A program: trains each of the configs named on the command line, in one process group."""

import sys
from pathlib import Path

from kdav_fast.config import load_config
from kdav_fast.train.loop import run_training

if __name__ == "__main__":
    for file in sys.argv[1:]:
        assert run_training(load_config(Path(file))) is not None
