"""What a checkpoint's folder says of its own files, and whether they are still what it says."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FOLDER_NAME = re.compile(r"step-(\d{8,})")
_SEAL = "sha256"
_FILE_NAME = re.compile(r"\w[\w.-]*")


def step_of(folder: Path) -> int:
    """The optimizer step after which a checkpoint was saved, by its folder's name."""
    return int(FOLDER_NAME.fullmatch(folder.name)[1])


def record_of(content: bytes) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The manifest as a file: with a checksum of its own.

    Args:
        manifest: `step`, `files` (records by name), and other JSON values.
    """
    return json.dumps({**manifest, _SEAL: _seal(manifest)}, indent=1).encode()


def unsealed(text: str) -> dict[str, Any] | None:
    """What `manifest_bytes` made a file of; None if it is something else by now.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: it is no such file.
    """
    manifest = json.loads(text)
    return manifest if manifest.pop(_SEAL) == _seal(manifest) else None


def read_manifest(folder: Path) -> tuple[dict[str, Any], str | None]:
    """A checkpoint's manifest, and what is wrong with it."""
    try:
        manifest = unsealed((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest is None or manifest["step"] != step_of(folder):
            return {"files": {}}, f"{MANIFEST} has other content than was written"
        files = manifest["files"].items()
        if all(_FILE_NAME.fullmatch(name) and {"bytes", "sha256"} <= record.keys() for name, record in files):
            return manifest, None
    except OSError as error:
        return {"files": {}}, f"{MANIFEST}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return {"files": {}}, f"{MANIFEST} is not a manifest"


def defect(file: Path, record: dict[str, Any]) -> str | None:
    """What is wrong with one file of a checkpoint, which is read as a whole; None if nothing is."""
    try:
        found = file.stat().st_size
        if found != record["bytes"]:
            return f"{file.name} has {found} bytes instead of {record['bytes']}"
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != record["sha256"]:
                return f"{file.name} has other content than was written"
    except OSError as error:
        return f"{file.name}: {error.strerror}"
    return None


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
