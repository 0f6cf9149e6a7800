"""Where the package keeps files for itself between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/kdav_fast`, or `~/.cache/kdav_fast`; may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kdav_fast"
