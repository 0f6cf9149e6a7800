"""Where the images of a WebDataset tar shard lie in it, and their labels.

A sample is a run of members whose paths are equal up to the first dot of the file name; what follows that dot
is the member's field. Its image is its first field of a known image format, its label is the number in `cls`.
"""

import hashlib
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from kdav_fast.data.cache import cache_folder
from kdav_fast.data.formats import IMAGE_SUFFIXES
from kdav_fast.data.image_set import printable
from kdav_fast.data.sources.folder import open_regular_file
from kdav_fast.errors import InputError
from kdav_fast.runtime.files import write_cached
from kdav_fast.runtime.progress_bar import ProgressBar

_IMAGE_FIELDS = frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES)
_LABEL_FIELD = "cls"
# A larger number is no label, and would ask for as many class names.
_LABEL = re.compile(rb"\s*0*(\d{1,6})\s*")
_LABEL_BYTES = 64
_RULES = "2"  # of what a sample is: an index made by others is made again
_BLOCK = tarfile.BLOCKSIZE
_THREADS = 16  # they wait for the file system most of the time, so more than there are cores


class ShardIndex(NamedTuple):
    """The M samples of one shard, in its order."""

    members: tuple[str, ...]
    """Paths of the images in the tar. A name that is not UTF-8 holds surrogate escapes."""
    offsets: np.ndarray
    """First byte of each image in the shard, int64."""
    sizes: np.ndarray
    """Bytes of each image, int64."""
    labels: np.ndarray
    """int64."""


class _Member(NamedTuple):
    name: str
    offset: int
    size: int

    def split(self) -> tuple[str, str]:
        """Key and field in lower case; both are empty for a member that belongs to no sample."""
        folder, slash, base = self.name.rpartition("/")
        stem, _, field = base.partition(".")
        return (folder + slash + stem, field.lower()) if stem and field else ("", "")


def index_shards(shards: Sequence[Path], description: str) -> list[ShardIndex]:
    """Index shards in parallel; those that a former call indexed are taken from the cache.

    Args:
        shards: paths of tar files.
        description: of the bar on stderr, which appears after two seconds.

    Raises:
        InputError: a shard cannot be read, is no whole tar, or has a sample without image or label or two
            samples of one key.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        indices = pool.map(index_shard, shards)
        return list(ProgressBar(indices, description, len(shards), unit="shard", delay=2, disable=None))


def index_shard(path: Path) -> ShardIndex:
    """Index one shard: from the cache, else from DALI's index beside it, else from its own headers.

    Raises:
        InputError: it cannot be read, is no whole tar, or has a sample without image or label or two
            samples of one key.
    """
    try:
        with open_regular_file(str(path)) as shard:
            record = _cache_record(path, shard)
            index = _cached(record)
            if index is None:
                members = _listed_by_dali(path, shard) or _scanned(path, shard)
                index = _index_samples(path, shard, members)
                _cache(record, index)
            return index
    except OSError as error:
        raise InputError(
            f"shard {printable(str(path))} cannot be read: {error.strerror or error}; give tar files that can be read"
        ) from None


def _listed_by_dali(path: Path, shard: BinaryIO) -> list[_Member]:
    """The members that the `.idx` file beside a shard lists; none if it cannot be trusted.

    Its offsets are checked at the headers they point behind: NVIDIA's `wds2idx` gives wrong ones for GNU's long
    names.
    """
    index, status = path.with_suffix(".idx"), os.fstat(shard.fileno())
    with suppress(OSError, ValueError):
        if index.stat().st_mtime_ns >= status.st_mtime_ns:
            members = _parse_dali_index(index.read_bytes())
            used = (member for member in members if member.split()[1] in (*_IMAGE_FIELDS, _LABEL_FIELD))
            if all(_has_header(shard, member, status.st_size) for member in used):
                return members
    return []


def _parse_dali_index(content: bytes) -> list[_Member]:
    """Read `v1.2 SAMPLES`, then a line a sample: `FIELD OFFSET SIZE NAME` for each of its members.

    Raises:
        ValueError: anything else. Before v1.2 there were no names; in a name with white space, or with the
            backslashes that tar writes for other bytes, the words are no longer what they seem.
    """
    header, *lines = content.split(b"\n")
    samples = [line.split() for line in lines if line]
    if header.split() != [b"v1.2", b"%d" % len(samples)] or b"\\" in content:
        raise ValueError("no index of this kind")
    members = []
    for words in samples:
        for field, offset, size, name in zip(words[::4], words[1::4], words[2::4], words[3::4], strict=True):
            if not name.rpartition(b"/")[2].endswith(b"." + field):
                raise ValueError("a name that is not of its field")
            members.append(_Member(os.fsdecode(name), int(offset), int(size)))
    return members


def _has_header(shard: BinaryIO, member: _Member, shard_size: int) -> bool:
    """Whether the block before a member's bytes is the tar header of a file of its size."""
    if not _BLOCK <= member.offset <= member.offset + member.size <= shard_size:
        return False
    block = os.pread(shard.fileno(), _BLOCK, member.offset - _BLOCK)
    # TarInfo.frombuf would take longer than scanning the tar does.
    return block[257:262] == b"ustar" and block[156] in b"0\0" and block[124:135] == b"%011o" % member.size


def _scanned(path: Path, shard: BinaryIO) -> Iterator[_Member]:
    """The regular files of a tar, by its headers."""
    try:
        with tarfile.open(fileobj=shard, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep every header in memory
                if member.isreg() and not member.issparse():
                    yield _Member(member.name, member.offset_data, member.size)
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise _damaged(path, str(error)) from None
    # At a broken header, and at an end of file between two members, tarfile stops without a word.
    if os.pread(shard.fileno(), _BLOCK, end) != bytes(_BLOCK):
        raise _damaged(path, f"no end mark at byte {end}")


def _damaged(path: Path, detail: str) -> InputError:
    return InputError(
        f"shard {printable(str(path))} is truncated or no uncompressed tar ({detail}); copy or make it again"
    )


def _index_samples(path: Path, shard: BinaryIO, members: Iterable[_Member]) -> ShardIndex:
    """Group members to samples and read their labels."""
    names, offsets, sizes, labels = [], [], [], []
    images: dict[str, _Member] = {}
    # Without a key are the hidden files that macOS puts before each of a sample's own.
    with_key = (member for member in members if member.split()[0])
    for key, sample in groupby(with_key, key=lambda member: member.split()[0]):
        image = label = None
        fields: dict[str, _Member] = {}
        for member in sample:
            field = member.split()[1]
            if (other := fields.setdefault(field, member)) is not member:
                raise _repeated(path, key, other, member)
            if image is None and field in _IMAGE_FIELDS:
                image = member
            elif label is None and field == _LABEL_FIELD:
                label = member
        for found, lacking in ((image, f"image ({', '.join(IMAGE_SUFFIXES)})"), (label, f".{_LABEL_FIELD}")):
            if found is None:
                raise InputError(
                    f"sample {printable(key)} of shard {printable(str(path))} has no {lacking}; "
                    "put the files of a sample next to each other, or remove it"
                )
        if (other := images.setdefault(key, image)) is not image:
            raise _repeated(path, key, other, image)
        names.append(image.name)
        offsets.append(image.offset)
        sizes.append(image.size)
        labels.append(_read_label(path, shard, key, label))
    if not names:
        raise InputError(
            f"shard {printable(str(path))} holds no samples; put KEY.jpg and KEY.{_LABEL_FIELD} into it, or remove it"
        )
    return ShardIndex(tuple(names), *(np.array(column, np.int64) for column in (offsets, sizes, labels)))


def _repeated(path: Path, key: str, one: _Member, other: _Member) -> InputError:
    places = " and ".join(f"{printable(member.name)} at byte {member.offset:,}" for member in (one, other))
    return InputError(
        f"shard {printable(str(path))} holds more than one sample of the key {printable(key)} ({places}); give each "
        "sample of a shard a key of its own"
    )


def _read_label(path: Path, shard: BinaryIO, key: str, member: _Member) -> int:
    content = os.pread(shard.fileno(), min(member.size, _LABEL_BYTES), member.offset)
    number = _LABEL.fullmatch(content)
    if number is None:
        raise InputError(
            f"the .{_LABEL_FIELD} of sample {printable(key)} in shard {printable(str(path))} holds {content[:20]!r}; "
            "it must hold a class number from 0 to 999999 as text"
        )
    return int(number[1])


def _cache_record(path: Path, shard: BinaryIO) -> Path:
    """Where the index of a shard is kept, for as long as the shard and DALI's index of it stay the same."""
    state = [_RULES, str(path.resolve())]
    state += [f"{status.st_size} {status.st_mtime_ns}" for status in _statuses(path, shard)]
    name = hashlib.sha256(os.fsencode("\n".join(state))).hexdigest()
    return cache_folder() / "tar-index" / f"{name}.npz"


def _statuses(path: Path, shard: BinaryIO) -> Iterator[os.stat_result]:
    yield os.fstat(shard.fileno())
    with suppress(OSError):
        yield path.with_suffix(".idx").stat()


def _cached(record: Path) -> ShardIndex | None:
    try:
        with np.load(record, allow_pickle=False) as columns:
            names = tuple(os.fsdecode(columns["members"].tobytes()).split("\0"))
            index = ShardIndex(names, columns["offsets"], columns["sizes"], columns["labels"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    return index if all(len(column) == len(names) for column in index) else None


def _cache(record: Path, index: ShardIndex) -> None:
    content = io.BytesIO()
    names = np.frombuffer(os.fsencode("\0".join(index.members)), np.uint8)
    np.savez(content, members=names, offsets=index.offsets, sizes=index.sizes, labels=index.labels)
    with suppress(OSError):  # the record only saves time: without a writable cache, index again
        write_cached(record, content.getvalue())
