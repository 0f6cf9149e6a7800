"""Entry point for the deepspeed launcher: `deepspeed launch/distill.py CONFIG [key=value ...]`.

The launcher starts this file once a process, with RANK, WORLD_SIZE and MASTER_ADDR in the environment; the
same command line as `kdav distill` follows. A config without a teacher and distiller trains a plain model.
"""

import sys

from kdav_fast.cli import main

sys.argv.insert(1, "distill")
sys.exit(main())
