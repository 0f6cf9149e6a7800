"""Files that the package keeps for itself between runs."""

import os
import uuid
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/kdav_fast`, or `~/.cache/kdav_fast`; may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kdav_fast"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or nothing, whoever else writes the same one. Makes the folder.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
