"""How every command of the project ends: bad input is one line and exit code 2."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import click

from runner.errors import UserError, WorkFailedError


def run_guarded(command: click.Command, arguments: Sequence[str] | None, *, program: str) -> int:
    """Run a click command and turn its end into an exit code.

    0: done. 1: the work itself failed. 2: bad input. 130: interrupted.
    """
    warnings.showwarning = _one_line
    try:
        command.main(args=arguments, prog_name=program, standalone_mode=False)
    except UserError as error:
        return _fail(str(error), 2)
    except click.UsageError as error:
        return _fail(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except WorkFailedError as error:
        return _fail(str(error), error.exit_code)
    return 0


def say_error(message: str) -> None:
    """Say what ended a program, in one line."""
    print(f"error: {message}", file=sys.stderr, flush=True)


def _fail(message: str, code: int) -> int:
    say_error(message)
    return code


def _one_line(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
