"""Small tar shards, and what they hold by Python's tarfile."""

import io
import os
import tarfile
from pathlib import Path

from kdav_fast.data.sources.tar_shards import TarShards

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
BLOCK = 512


def write_shard(path: Path, files: list[tuple[str, bytes]], form: str = "ustar") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for name, content in files:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            header.mtime = 1.5 if form == "pax" else 1  # a fraction gives every member an extended header
            tar.addfile(header, io.BytesIO(content))
    return path


def sample(key: str, label: int, image: bytes | None = None, field: str = "jpg") -> list[tuple[str, bytes]]:
    content = os.fsencode(f"image {key}") if image is None else image
    return [(f"{key}.{field}", content), (f"{key}.cls", str(label).encode())]


def contents(path: Path) -> dict[str, bytes]:
    """What Python's tarfile extracts."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isreg()}


def images_of(shards: TarShards) -> dict[str, bytes]:
    return {shards.name(i): shards.read(i).tobytes() for i in range(len(shards))}


def write_dali_index(shard: Path, names: list[list[str]], version: str = "v1.2") -> Path:
    """The index of some samples, each the names of its members, as `wds2idx` writes it."""
    with tarfile.open(shard) as tar:
        places = {member.name: (member.offset_data, member.size) for member in tar}
    lines = [f"{version} {len(names)}"]
    for members in names:
        columns = [(name.partition(".")[2], *places[name], name) for name in members]
        lines.append(" ".join(str(word) for column in columns for word in column))
    index = shard.with_suffix(".idx")
    index.write_text("\n".join(lines) + "\n")
    return index


def write_data_set(root: Path) -> Path:
    """Two training shards of two samples each, one evaluation shard of one; 4 classes."""
    write_shard(root / "train-0000.tar", sample("a", 3) + sample("b", 0))
    write_shard(root / "train-0001.tar", sample("c", 1) + sample("d", 2))
    write_shard(root / "val-0000.tar", sample("e", 2))
    return root
