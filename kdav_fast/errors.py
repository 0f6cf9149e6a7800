"""The exceptions that mean "not our code": the user's input, or another process."""

_MESSAGE = 2000
_VALUE = 100


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


def shown(value: object, length: int = _VALUE) -> str:
    """A value as a message quotes it: as Python writes it, cut in the middle beyond `length` characters."""
    if isinstance(value, str):
        return repr(_cut(value, length))  # not first a representation of megabytes
    try:
        return _cut(repr(value), length)
    except (ValueError, RecursionError):  # of a whole number of thousands of digits, or of a list in itself
        return f"a {type(value).__name__}"


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
