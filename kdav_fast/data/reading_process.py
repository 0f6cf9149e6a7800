"""A process that reads image files for one that trains, so that neither waits for the other's interpreter.

`read_ahead` runs this file as a script, with the standard library alone: it starts in 25 ms and takes 13 MB. What the
two say to each other goes over a socket: which slab, and how many of its bytes are meant. What they mean lies in
the slab: a batch's request and then, in its place, its contents.

The process ends when the other one does, at the latest after the files that it is reading.
"""

import errno
import json
import mmap
import os
import resource
import select
import socket
import stat
import struct
import sys
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

MESSAGE = struct.Struct("=qq")
"""Number of the slab; bytes of the request, or of its answer: below 0 for an error, as JSON."""
# The next files' worth of reading after which the other process is looked for, and the storage is judged.
_CHUNK = 16
# Threads, once files make us wait; more of them than cores hide the latency of a file system.
_THREADS = 8
_LOOK = (
    5000  # milliseconds between two looks for the other process; a fork of it may hold its end of the socket
)
_LEAST = 2**20  # bytes of a slab
_REQUEST = struct.Struct("=qq")  # images; whether their sizes are wanted
# Of JPEG and PNG, which DALI decodes as they are.
_PLAIN = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


class Slab:
    """Memory that two processes share. It has no name: once both have ended, nothing is left of it.

    Args:
        descriptor: of `os.memfd_create`; closed with this.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._bytes = memoryview(b"")

    def __del__(self) -> None:
        os.close(self.descriptor)

    def first(self, length: int) -> memoryview:
        """Its first bytes; it becomes as long as that takes. Earlier views stay valid and show the same memory."""
        if length > len(self._bytes):
            size = os.fstat(self.descriptor).st_size
            if length > size:
                size = max(length, 2 * size, _LEAST)
                os.ftruncate(self.descriptor, size)
            self._bytes = memoryview(mmap.mmap(self.descriptor, size))
        return self._bytes[:length]


def pack_request(paths: Sequence[str], starts: bytes, sizes: bytes, measure: bool) -> bytes:
    """What to read for a batch of N images: files, first bytes, and sizes (-1: to the end), as N int64 each; and
    whether to look up how high and wide they are."""
    return _REQUEST.pack(len(paths), measure) + starts + sizes + os.fsencode("\0".join(paths))


def table_columns(measure: bool) -> int:
    """Of an answer's table, int64: start and end of each content in it, and height and width of the image."""
    return 4 if measure else 2


def open_range(path: bytes | str, size: int) -> tuple[int, int]:
    """Open a regular file, and never wait for a pipe or a device: its descriptor, and how much is to be read.

    Args:
        path: of the file.
        size: bytes wanted, -1 for all.

    Raises:
        OSError: it cannot be opened, or it is not a regular file.
    """
    # Without O_NONBLOCK the mere opening of a named pipe waits for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor, status.st_size if size < 0 else size


def fill(content: memoryview, descriptor: int, start: int) -> int:
    """Read from byte `start` of a file on until `content` is full or the file ends: how many bytes that were."""
    got = 0
    while got < len(content):  # one call reads at most 2 GiB
        more = os.preadv(descriptor, [content[got:]], start + got)
        if more == 0:
            break
        got += more
    return got


def too_short(path: bytes | str) -> OSError:
    """For a part of a file that is not there."""
    return OSError(errno.EIO, "the shard is shorter than its index says", path)


class _Batch:
    """The contents of a batch's images in a slab, one behind the other after a table of where they are."""

    def __init__(self, slab: Slab, length: int) -> None:
        request = bytes(slab.first(length))
        count, self._measure = _REQUEST.unpack_from(request)
        paths = _REQUEST.size + 16 * count
        numbers = array("q", request[_REQUEST.size : paths])
        self._starts, self._sizes = numbers[:count], numbers[count:]
        self._paths = request[paths:].split(b"\0")
        self._slab = slab
        self._columns = table_columns(self._measure)
        self._table = array("q", bytes(8 * self._columns * count))
        self._used = 8 * len(self._table)
        self._taking = threading.Lock()
        self.odd: list[int] = []

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, number: int) -> None:
        """Bring in one image's bytes."""
        path, start, size = self._paths[number], self._starts[number], self._sizes[number]
        descriptor = None
        try:
            descriptor, room = open_range(path, size)
            at, content = self._take(room)
            got = fill(content, descriptor, start)
            if got < size:
                raise too_short(path)
        except OSError as error:
            error.filename = error.filename or path
            raise
        finally:
            if descriptor is not None:
                os.close(descriptor)
        self._enter(number, at, at + got)
        if not content[:8].tobytes().startswith(_PLAIN):
            self.odd.append(number)

    def convert(self, number: int, convert: Callable) -> None:
        """Replace one image's bytes by what `convert` makes of them."""
        if (packed := convert(self._content(number))) is not None:
            at, room = self._take(len(packed))
            room[:] = packed
            self._enter(number, at, at + len(packed))

    def measure(self, size_of: Callable[[memoryview], tuple[int, int] | None]) -> None:
        """Enter the height and width of every image, if they are wanted."""
        for number in range(len(self) if self._measure else 0):
            size = size_of(self._content(number))
            if size is None:
                raise OSError(
                    errno.EINVAL, "its header does not say how large the image is", self._paths[number]
                )
            self._enter(number, *size, column=2)

    def finish(self) -> int:
        """Write the table: how many bytes of the slab are in use."""
        self._slab.first(len(self._table) * 8)[:] = self._table.tobytes()
        return self._used

    def _content(self, number: int) -> memoryview:
        start, end = self._table[self._columns * number : self._columns * number + 2]
        return self._slab.first(end)[start:]

    def _enter(self, number: int, one: int, other: int, column: int = 0) -> None:
        at = self._columns * number + column
        self._table[at], self._table[at + 1] = one, other

    def _take(self, size: int) -> tuple[int, memoryview]:
        """Room for some bytes, and where it is."""
        with self._taking:
            at, self._used = self._used, self._used + size
            return at, self._slab.first(self._used)[at:]


class _Server:
    """Answers one request after the other.

    Args:
        channel: to the other process.
        search_path: its `sys.path`.
        size_of: height and width of the image in a file's bytes.
    """

    def __init__(self, channel: socket.socket, search_path: list[str], size_of: Callable) -> None:
        self._channel, self._search_path, self._size_of = channel, search_path, size_of
        self._slabs: dict[int, Slab] = {}
        self._pool = None
        self._convert: Callable | None = None

    def answer_next(self) -> bool:
        """False once nobody asks any more."""
        message, descriptors, *_ = socket.recv_fds(self._channel, MESSAGE.size, 1)
        if not message:
            return False
        number, length = MESSAGE.unpack(message)
        if descriptors:
            self._slabs[number] = Slab(descriptors[0])
        slab = self._slabs[number]
        try:
            used = self._read(_Batch(slab, length))
        except OSError as error:
            path = error.filename and os.fsdecode(error.filename)
            text = json.dumps([error.errno, error.strerror or str(error), path]).encode()
            slab.first(len(text))[:] = text
            used = -len(text)
        self._channel.send(MESSAGE.pack(number, used))
        return True

    def _read(self, batch: _Batch) -> int:
        """One file after the other while they come from the system's cache; the rest together once they do not."""
        for first in range(0, len(batch), _CHUNK):
            if first and self._abandoned():
                os._exit(0)  # without waiting for threads
            waited = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
            for number in range(first, min(first + _CHUNK, len(batch))):
                batch.read(number)
            if resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - waited > _CHUNK // 4:
                self._together(batch.read, range(first + _CHUNK, len(batch)))
                break
        if batch.odd:
            convert = self._converter()
            self._together(lambda number: batch.convert(number, convert), batch.odd)
        batch.measure(self._size_of)
        return batch.finish()

    def _abandoned(self) -> bool:
        with suppress(BlockingIOError):
            return not self._channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return False

    def _together(self, work: Callable[[int], None], numbers: Iterable[int]) -> None:
        """In threads; returns or raises only when all have ended, since they write to the slab."""
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor

            self._pool = ThreadPoolExecutor(_THREADS)
        for error in [task.exception() for task in [self._pool.submit(work, n) for n in numbers]]:
            if error is not None:
                raise error

    def _converter(self) -> Callable:
        """From a file's bytes to what DALI decodes instead, or None; only rare formats need the package for it."""
        if self._convert is None:
            import site

            sys.path[:] = self._search_path
            site.main()
            import numpy as np

            from kdav_fast.data.formats import for_dali

            def convert(content: memoryview) -> memoryview | None:
                whole = np.frombuffer(content, np.uint8)
                packed = for_dali(whole)
                return None if packed is whole else memoryview(packed)

            self._convert = convert
        return self._convert


def main(parent: int, search_path: list[str]) -> None:
    """Serve the process that is at the other end of the standard input, until it ends."""
    # The package would bring NumPy along, which takes longer to load than all else.
    sys.path.append(__file__.rpartition("/")[0])
    from image_header import size_in_header

    sys.path.pop()
    channel = socket.socket(fileno=0)
    server = _Server(channel, search_path, size_in_header)
    coming = select.poll()
    coming.register(channel, select.POLLIN)
    with suppress(ConnectionError):
        while os.getppid() == parent:
            if coming.poll(_LOOK) and not server.answer_next():
                break


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
    os._exit(0)
