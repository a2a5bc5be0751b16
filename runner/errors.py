"""Errors that a user can mend."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, the value, and what is allowed.

    Every entry point prints it as ``error: <line>`` and exits with code 2.
    """
