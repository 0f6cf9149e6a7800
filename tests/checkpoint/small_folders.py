"""Checkpoint folders without training: how the tests of them save, damage and look."""

import torch

from kdav_fast.checkpoint.folders import CheckpointFolders
from kdav_fast.runtime.processes import Cluster

ALONE = Cluster(0, 1, 0, 1, torch.device("cpu"))
PIECES, STATE = "pieces-00000.safetensors", "rank-00000.json"


def folders_in(root, keep=9, keep_best=True):
    return CheckpointFolders(root, ALONE, keep, keep_best)


def contents(step):
    return {PIECES: bytes([step]) * 10_000, STATE: b'{"step": %d}' % step}


def save(folders, step, score=None):
    folders.begin(step, contents(step), {"score": score})
    folders.finish()


def steps_in(root):
    return [int(path.name.removeprefix("step-")) for path in sorted(root.glob("step-*[0-9]"))]


def flip_bit(file, position, bit=0):
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def snapshot(root):
    return {path.relative_to(root): path.is_file() and path.read_bytes() for path in root.rglob("*")}
