"""Too little memory and the like: one line that says what to lower or to raise."""

import errno
import os

import numpy as np
import pytest
import torch

from kdav_fast.errors import lack_of_means, listed, named, one_line


def error_of(function, *arguments) -> Exception:
    with pytest.raises((MemoryError, RuntimeError, OSError)) as caught:
        function(*arguments)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        error_of(torch.empty, 1 << 59),
        error_of(np.empty, 1 << 59),
        error_of(bytearray, 1 << 61),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has\nmore to say"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
    ids=str,
)
def test_too_little_memory(error):
    message = str(lack_of_means(error))
    assert message.startswith("not enough memory (")
    assert "lower train.batch_size" in message
    assert "enforce fail" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("can't start new thread"), "raise ulimit -u and -v, or lower data.workers"),
        (OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "raise ulimit -u"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a.jpg"), "a.jpg.*raise ulimit -n"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            "cannot write the output: No space left.*make room",
        ),
    ],
)
def test_too_little_of_something_else(error, said):
    with pytest.raises(ValueError, match=said):
        raise lack_of_means(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.EIO, "x"), RuntimeError()])
def test_other_errors_are_our_own(error):
    assert lack_of_means(error) is None


@pytest.mark.parametrize(
    ("error", "line", "with_name"),
    [
        (RuntimeError("two\n  lines"), "two lines", "RuntimeError: two lines"),
        (KeyError("step"), "'step'", "KeyError: 'step'"),
        (MemoryError(), "MemoryError", "MemoryError"),
        (
            RuntimeError("no port\nException raised from f at a.cpp:1\nframe #0"),
            "no port",
            "RuntimeError: no port",
        ),
    ],
)
def test_what_an_error_says(error, line, with_name):
    assert (one_line(error), named(error)) == (line, with_name)


def test_a_long_error_keeps_its_beginning_and_its_end():
    line = one_line(ValueError("because " + "x" * 10_000 + " of this"))
    assert line.startswith("because x")
    assert line.endswith("x of this")
    assert len(line) <= 300


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2 and 1 more"), (2003, "0, 1, 2 and 2,000 more")],
)
def test_a_list_names_the_first(count, text):
    assert listed(range(count), 3) == text


def test_a_list_of_clauses():
    assert listed(["a is 1", "b is 2", "c is 3"], 2, "; ") == "a is 1; b is 2; and 1 more"
