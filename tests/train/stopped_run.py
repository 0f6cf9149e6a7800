"""What the tests of a stopped run do to it and read from it."""

import json

from kdav_fast.checkpoint.manifest import MANIFEST, manifest_bytes
from kdav_fast.cli import main
from kdav_fast.config import dump_config
from kdav_fast.student.file import FILE_NAME

PIECES, BUFFERS, STATE = "pieces-00000.safetensors", "buffers-00000.safetensors", "rank-00000.json"
DISTILLER, STUDENT = "distiller.safetensors", FILE_NAME


def kdav(config, command="distill"):
    """Exit code of `kdav COMMAND CONFIG`."""
    file = config.run_dir.with_name("config.yaml")
    file.write_text(dump_config(config))
    return main([command, str(file)])


def error_line(capsys):
    """The one line that `kdav` printed as it gave up."""
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("kdav: error: ")
    return line


def student_of(run_dir):
    return (run_dir / STUDENT).read_bytes()


def change_manifest(checkpoint, change):
    """Call `change` with a checkpoint's manifest, and seal what becomes of it."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["sha256"]
    change(manifest)
    (checkpoint / MANIFEST).write_bytes(manifest_bytes(manifest))
