"""One shard as a file: a safetensors file whose header the cache's card decides, but for the sum of what follows."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdav_fast.teachers.cache.card import CacheCard
from kdav_fast.teachers.cache.layout import Layout

Blocks = dict[str, NDArray]
"""Arrays by the names of a layout's parts, one row a record."""
_ALIGNMENT = 64
_NO_SUM = "0" * 64
_THREADS = 8


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:06d}.safetensors"


def shard_header(card: CacheCard, shard: int, digest: str = _NO_SUM) -> bytes:
    """What stands before a shard's tensors.

    Args:
        card: of the cache.
        shard: its number.
        digest: SHA-256 of all that follows; the header is as long whatever it is.
    """
    records, start = card.layout.records_of(shard), 0
    about = {"cache": card.name, "shard": f"{shard:06d}", "sha256": digest}
    header = {"__metadata__": about}
    for part in card.layout.parts:
        end = start + records * part.bytes
        shape = [records, part.width]
        header[part.name] = {
            "dtype": part.storage.safetensors,
            "shape": shape,
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def shard_size(card: CacheCard, shard: int) -> int:
    """Bytes of the file."""
    data = card.layout.records_of(shard) * card.layout.bytes_per_view
    return len(shard_header(card, shard)) + data


def cache_size(card: CacheCard) -> int:
    """Bytes of all shards."""
    last = card.layout.shards - 1
    return last * shard_size(card, 0) + shard_size(card, last)  # all but the last are alike


def blocks_of(layout: Layout, shard: int, content: NDArray[np.uint8]) -> Blocks:
    """The parts of a shard, in place.

    Args:
        content: what follows the header.
    """
    blocks, start, records = {}, 0, layout.records_of(shard)
    for part in layout.parts:
        end = start + records * part.bytes
        blocks[part.name] = content[start:end].view(part.storage.array).reshape(records, part.width)
        start = end
    return blocks


def defect(folder: Path, card: CacheCard, shard: int, sums: bool) -> str | None:
    """What is wrong with a shard; None if nothing is.

    Args:
        sums: read all of it; otherwise its header and its size.
    """
    path, expected = shard_path(folder, shard), shard_header(card, shard)
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            return f"{path.name} is no file"
        with path.open("rb") as file:
            header, size = file.read(len(expected)), path.stat().st_size
            digest = _digest_in(header, expected)
            if digest is None:
                return f"{path.name} {_whose(header, card, shard)}"
            if size != shard_size(card, shard):
                return f"{path.name} has {size:,} bytes instead of {shard_size(card, shard):,}"
            if sums and _sum_of_rest(file) != digest:
                return f"{path.name} has other content than was written"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None


def defects(
    folder: Path,
    card: CacheCard,
    sums: bool,
    shards: Iterable[int] | None = None,
    progress: Callable[[], object] = lambda: None,
) -> dict[int, str]:
    """What is wrong with a cache's shards, by their numbers.

    Args:
        sums: read all of them; otherwise only their headers and sizes.
        shards: which ones; None: all.
        progress: called after each shard, in whichever thread.
    """

    def of(shard: int) -> tuple[int, str | None]:
        found = defect(folder, card, shard, sums)
        progress()
        return shard, found

    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(of, range(card.layout.shards) if shards is None else shards)
        return {shard: problem for shard, problem in found if problem}


def _digest_in(header: bytes, expected: bytes) -> str | None:
    """The sum in a header that is as expected otherwise."""
    start = expected.index(_NO_SUM.encode())
    end = start + len(_NO_SUM)
    if header[:start] + header[end:] != expected[:start] + expected[end:]:
        return None
    return header[start:end].decode("ascii", "replace")


def _whose(header: bytes, card: CacheCard, shard: int) -> str:
    """What a header that is not as expected says of its shard."""
    if not header:
        return "is empty"
    about = re.match(rb'.{8}\{"__metadata__":\{"cache":"([0-9a-f]{64})","shard":"(\d+)"', header, re.DOTALL)
    if about and about[1].decode() != card.name:
        return "is of another cache"
    if about and int(about[2]) != shard:
        return f"holds shard {int(about[2])}"
    return "has another header than was written"


def _sum_of_rest(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()
