"""Reading the files of coming batches while earlier ones are decoded."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

import numpy as np

# Threads mostly wait for the file system; more of them than cores hide its latency.
READERS = 8


def read_ahead(
    batches: Iterable[np.ndarray], read: Callable[[int], np.ndarray], depth: int
) -> Iterator[list[np.ndarray]]:
    """The contents of every batch's images, read by threads `depth` batches ahead.

    Args:
        batches: B image positions each; may be endless.
        read: from a position to the image's bytes; called by several threads.
        depth: how many batches are read beyond the one that is yielded.

    Raises:
        OSError: what `read` raises, when its batch is asked for.
    """

    def read_part(positions: Sequence[int]) -> list[np.ndarray]:
        return [read(position) for position in positions]

    # Never shut down or joined here: a discarded iterator is finalised wherever Python's collector happens to run,
    # which may be inside `threading` or `concurrent.futures`, under the very lock that a shutdown waits for.
    # The threads end by themselves once nothing refers to the pool.
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="read-ahead")
    # One task a thread and batch: a task for each image costs more than reading a small one.
    pending: deque[list[Future]] = deque()
    for batch in batches:
        parts = np.array_split(batch, READERS)
        pending.append([pool.submit(read_part, part.tolist()) for part in parts if len(part)])
        if len(pending) > depth:
            yield _contents(pending.popleft())
    while pending:
        yield _contents(pending.popleft())


def _contents(parts: list[Future]) -> list[np.ndarray]:
    return list(chain.from_iterable(part.result() for part in parts))
