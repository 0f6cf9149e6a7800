import importlib
import threading
import time
from contextlib import ExitStack
from itertools import count, islice

import numpy as np
import pytest

from kdav_fast.data.read_ahead import read_ahead

LOCK = type(threading.Lock())


def test_contents_come_in_the_order_of_the_positions_whichever_is_read_first():
    def read(position):
        time.sleep(0.002 * (position % 3))
        return np.array([position])

    batches = [np.array([5, 0, 3]), np.arange(20), np.array([7])]
    found = list(read_ahead(batches, read, depth=2))
    assert [[int(content[0]) for content in batch] for batch in found] == [b.tolist() for b in batches]


def test_it_reads_as_far_ahead_as_it_was_told():
    read, done = [], threading.Event()

    def note(position):
        read.append(position)
        if position == 11:
            done.set()
        return np.zeros(1)

    endless = (np.arange(start, start + 4) for start in count(0, 4))
    contents = read_ahead(endless, note, depth=2)
    next(contents)
    assert done.wait(10)
    assert sorted(read) == list(range(12))
    contents.close()


def test_an_error_appears_with_its_own_batch():
    def read(position):
        if position == 5:
            raise OSError("gone")
        return np.array([position])

    contents = read_ahead((np.arange(start, start + 2) for start in (0, 2, 4, 6)), read, depth=2)
    assert len(list(islice(contents, 2))) == 2
    with pytest.raises(OSError, match="gone"):
        next(contents)


def endless_reading():
    """An iterator whose threads have begun."""
    contents = read_ahead((np.arange(4) for _ in count()), lambda position: np.zeros(1), depth=1)
    next(contents)
    return contents


def test_its_threads_end_with_it():
    before = set(threading.enumerate())
    contents = endless_reading()
    started = [t for t in set(threading.enumerate()) - before if t.name.startswith("read-ahead")]
    assert started
    del contents
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("module", ["threading", "concurrent.futures.thread"])
def test_it_can_be_collected_under_any_lock_of_the_library(module):
    """Where the collector runs is chance: it once ran while a thread was starting, and joined threads there."""
    locks = [lock for lock in vars(importlib.import_module(module)).values() if isinstance(lock, LOCK)]
    assert locks
    contents = [endless_reading()]

    def collect():
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            contents.clear()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
