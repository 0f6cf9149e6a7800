"""The one exception that means "your input, not our code"."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that says what was given, what is allowed and what to do. The command line
    prints it without a traceback and exits with code 2.
    """
