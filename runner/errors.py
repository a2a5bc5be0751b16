"""Errors that end a command with one line and an exit code."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, the value, and what is allowed.

    Every entry point prints it as ``error: <line>`` and exits with code 2.
    """


class WorkFailedError(Exception):
    """The work itself failed, though the input was fine: one line that says what happened.

    Every entry point prints it as ``error: <line>`` and exits with ``exit_code``.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
