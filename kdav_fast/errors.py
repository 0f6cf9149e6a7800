"""The exceptions that mean "not our code": the user's input, or another process."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that says what was given, what is allowed and what to do. The command line
    prints it without a traceback and exits with code 2.
    """


class RankLostError(RuntimeError):
    """Another process of the run is gone; the message is one line that names it and says what to do."""
