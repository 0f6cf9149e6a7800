"""Too little memory and the like: one line that says what to lower or to raise."""

import errno
import os

import numpy as np
import pytest
import torch

from kdav_fast.errors import lack_of_means


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
