"""`python -m kdav_fast` is the `kdav` command."""

import sys

from kdav_fast.cli import main

sys.exit(main())
