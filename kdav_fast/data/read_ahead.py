"""Reading the files of coming batches, in another process, while earlier ones are decoded."""

import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from operator import itemgetter

import numpy as np

from kdav_fast.data import reading_process
from kdav_fast.data.image_set import EncodedImages
from kdav_fast.data.reading_process import MESSAGE, Slab, pack_request, table_columns
from kdav_fast.errors import RankLostError
from kdav_fast.runtime.interrupts import STOP_SIGNALS

_PATIENCE = 1.0  # seconds for a process that was killed to be gone


class ReaderLostError(RankLostError):
    """The process that reads is gone; told as that of a rank is."""


def read_ahead(
    batches: Iterable[np.ndarray], images: EncodedImages, depth: int
) -> Iterator[list[np.ndarray]]:
    """The contents of every batch's images as DALI decodes them, read `depth` batches ahead.

    The arrays lie in memory that is shared with the process that reads, and used again once nobody refers to any of a
    batch's. It holds as much as the largest batches did that lay there: of those that are referred to, and of
    `depth` + 1 more. The process ends with the iterator.

    Args:
        batches: B image positions each; may be endless.
        images: the split.
        depth: how many batches are read beyond the one that is yielded.

    Raises:
        OSError: an image cannot be read, when its batch is asked for.
        ReaderLostError: the process is gone.
    """
    # Not a generator: what it handed out last would lie in memory that is not used again.
    return map(itemgetter(0), _answers(batches, images, depth, measure=False))


def read_and_measure(
    batches: Iterable[np.ndarray], images: EncodedImages, depth: int
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """The same, and how large the images are as their headers say: B x 2 int64, height and width.

    Raises:
        OSError: also if a header does not say it.
    """
    return _answers(batches, images, depth, measure=True)


def _answers(
    batches: Iterable[np.ndarray], images: EncodedImages, depth: int, measure: bool
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    reader = _Reader(measure)
    for batch in batches:
        reader.ask(images, batch)
        if reader.asked > depth:
            yield reader.answer()
    while reader.asked:
        yield reader.answer()


class _Reader:
    """A process that reads, and looks up sizes if it shall measure."""

    def __init__(self, measure: bool) -> None:
        self._measure = measure
        self._creator = os.getpid()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The signals that stop a run are for the run, which may ask for more batches until it has saved its state.
        # A process inherits what its maker's thread does not want to hear of.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", reading_process.__file__, str(os.getpid()), *sys.path],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            theirs.close()
        self._free: deque[tuple[int, Slab]] = deque()
        weakref.finalize(self, _end, os.getpid(), self._process, self._channel, self._free)
        self._asked: deque[tuple[int, Slab, int]] = deque()  # and how many images
        self._slabs = 0

    @property
    def asked(self) -> int:
        """Batches that were asked for, and not answered yet."""
        return len(self._asked)

    def ask(self, images: EncodedImages, batch: np.ndarray) -> None:
        """Have a batch's images read."""
        self._refuse_forks()
        new = not self._free
        number, slab = self._new_slab() if new else self._free.popleft()
        places = images.places(batch)
        request = pack_request(places.paths, places.starts.tobytes(), places.sizes.tobytes(), self._measure)
        slab.first(len(request))[:] = request
        message = MESSAGE.pack(number, len(request))
        try:
            # Either side's messages are few and short: no one ever waits for room.
            socket.send_fds(self._channel, [message], [slab.descriptor] if new else [])
        except ConnectionError:
            raise self._lost() from None
        self._asked.append((number, slab, len(batch)))

    def answer(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The contents of the batch that was asked for first, and the sizes of its images: B x 2, or B x 0."""
        self._refuse_forks()
        try:
            message = self._channel.recv(MESSAGE.size)
        except ConnectionError:
            message = b""
        if not message:
            raise self._lost()
        _, length = MESSAGE.unpack(message)
        number, slab, count = self._asked.popleft()
        if length < 0:
            code, text, path = json.loads(bytes(slab.first(-length)))
            raise OSError(text) if code is None else OSError(code, text, path)
        whole = np.frombuffer(slab.first(length), np.uint8)
        # Each content's base. It dies when the last of them does.
        weakref.finalize(whole, self._free.append, (number, slab)).atexit = False
        columns = table_columns(self._measure)
        table = whole[: 8 * columns * count].view(np.int64).reshape(count, columns)
        # A copy: a view of the sizes would keep the slab from being used again.
        return [whole[start:end] for start, end in table[:, :2].tolist()], table[:, 2:].copy()

    def _refuse_forks(self) -> None:
        """What a fork takes out of the channel, its parent would miss."""
        if os.getpid() != self._creator:
            raise RuntimeError(
                f"a loader that process {self._creator} began to iterate is used in a fork of it; build a loader in "
                "each process"
            )

    def _new_slab(self) -> tuple[int, Slab]:
        self._slabs += 1
        return self._slabs, Slab(os.memfd_create("kdav_fast-files"))

    def _lost(self) -> ReaderLostError:
        code = self._process.wait()
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        host = socket.gethostname()
        return ReaderLostError(
            f"process {self._process.pid} on host {host}, which reads image files, {how}; if it was not you, look into "
            "the system's log for what ended it, such as a lack of memory"
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # of real-time signals only the first and the last have a name
        return f"signal {number}"


def _end(creator: int, process: subprocess.Popen, channel: socket.socket, free: deque) -> None:
    """Where a discarded reader is finalised is chance: wherever Python's collector runs, perhaps under a lock of the
    standard library. So this waits for no other thread, and for nothing for long."""
    if os.getpid() != creator:
        return  # a fork's copy was collected
    free.clear()
    channel.close()
    process.kill()
    with suppress(subprocess.TimeoutExpired):  # it hangs in a file system, and ends when that answers
        process.wait(_PATIENCE)
