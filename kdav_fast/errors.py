"""The exceptions that mean "not our code": the user's input, or another process. How messages put what they quote."""

import errno
import re
from collections.abc import Sequence

_MESSAGE = 2000
_VALUE = 100
_REASON = 300
_NO_MEMORY = re.compile(r"out of memory|(can't|cannot|unable to) allocate|bad_alloc", re.IGNORECASE)
"""As torch, CUDA, DALI, NumPy and the system say it."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that says what was given, what is allowed and what to do. The command line
    prints it without a traceback and exits with code 2. Whatever it quotes, it stays one line of bounded length.
    """

    told = True
    """Of several processes, whether the first one prints it as well."""

    def __init__(self, message: str) -> None:
        super().__init__(_cut(_printable(message), _MESSAGE))


class RankLostError(RuntimeError):
    """Another process of the run is gone; the message is one line that names it and says what to do."""


def lack_of_memory(error: Exception) -> str | None:
    """What an error says of too little memory; None for one that does not."""
    text = _first_line(error)
    if (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or _NO_MEMORY.search(text)
    ):
        return _cut(re.sub(r"^\[enforce fail at [^]]*\] (err == 0\. )?", "", text), 3 * _VALUE)
    return None


def lack_of_means(error: Exception, sizes: Sequence[str] = ()) -> InputError | None:
    """What to say where the machine has too little memory, threads, open files or room; None for other errors.

    Args:
        error: that was raised.
        sizes: keys of the run, beside those of every run, with which memory grows.
    """
    number = error.errno if isinstance(error, OSError) else None
    if reason := lack_of_memory(error):
        large = " or ".join(["data.image_size", *sizes])
        return InputError(
            f"not enough memory ({reason}); lower train.batch_size, raise train.accumulate, or lower what else is "
            f"large, such as {large}"
        )
    text = _first_line(error)
    reason = _cut(text, 3 * _VALUE)
    if "can't start new thread" in text or number == errno.EAGAIN:
        return InputError(
            f"no further thread or process ({reason}); raise ulimit -u and -v, or lower data.workers"
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return InputError(f"no further open file ({reason}); raise ulimit -n, to 1024 or more")
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InputError(f"cannot write {error.filename or 'the output'}: {error.strerror}; make room")
    return None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def shown(value: object, length: int = _VALUE) -> str:
    """A value as a message quotes it: as Python writes it, cut in the middle beyond `length` characters."""
    if isinstance(value, str):
        return repr(_cut(value, length))  # not first a representation of megabytes
    try:
        return _cut(repr(value), length)
    except (ValueError, RecursionError):  # of a whole number of thousands of digits, or of a list in itself
        return f"a {type(value).__name__}"


def one_line(error: BaseException) -> str:
    """What an exception says, in one line; the name of its type if it says nothing."""
    # torch's errors may go on with a stack of C++.
    text = re.split(r"\n(?:Exception raised from|C\+\+ CapturedTraceback)", str(error))[0]
    return _cut(" ".join(text.split()), _REASON) or type(error).__name__


def named(error: BaseException) -> str:
    """The same behind the name of its type, where what it says alone may be a key or a number."""
    name, text = type(error).__name__, one_line(error)
    return name if text == name else f"{name}: {text}"


def listed(items: Sequence[object], most: int, separator: str = ", ") -> str:
    """The first `most` of some items, and how many there are besides."""
    first = separator.join(map(str, items[:most]))
    link = " " if separator == ", " else separator
    return first if len(items) <= most else f"{first}{link}and {len(items) - most:,} more"


def _cut(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    half = (length - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def _printable(text: str) -> str:
    """No line ends, and nothing that a terminal would obey."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)
