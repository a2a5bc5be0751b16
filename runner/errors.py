"""Errors that end a command, and how they are printed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from click import Command


class UserError(Exception):
    """Bad input: one line that says what is wrong, the value, and what is allowed.

    Every entry point prints it as ``error: <line>`` and exits with code 2.
    """


class WorkFailedError(Exception):
    """The work failed in a way that one line explains; the program exits with ``exit_code``."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_guarded(command: Command, arguments: Sequence[str] | None, *, program: str) -> int:
    """Run a click command, print each error and warning on one line, and return the exit code.

    0: done. 1: the work itself failed. 2: bad input. 130: interrupted.
    """
    import click

    with warnings.catch_warnings():
        warnings.showwarning = _show_in_one_line
        try:
            command.main(args=arguments, prog_name=program, standalone_mode=False)
        except UserError as error:
            return _fail(str(error), 2)
        except getattr(click.exceptions, "NoArgsIsHelpError", ()) as error:
            print(error.format_message(), file=sys.stderr)
            return 2
        except click.UsageError as error:
            return _fail(error.format_message(), 2)
        except (click.Abort, KeyboardInterrupt):
            return _fail("interrupted", 130)
        except WorkFailedError as error:
            return _fail(str(error), error.exit_code)
    return 0


def print_error(message: str) -> None:
    """Print the error that ended a program, on one line."""
    print(f"error: {message}", file=sys.stderr, flush=True)


def _fail(message: str, code: int) -> int:
    print_error(message)
    return code


def _show_in_one_line(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
