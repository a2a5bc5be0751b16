"""How a rank that failed says so, in one line and where torch's launcher looks for it."""

from __future__ import annotations

import os
import traceback
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from launch.deadline import OutOfTimeError
from launch.elastic import lost_a_peer
from runner.cli.guard import WorkFailedError, say_error
from runner.errors import UserError
from runner.jit.compiler import CompileError


def rank_failure(rank: int, error: Exception) -> WorkFailedError:
    """Leave the error where torch's launcher looks for it, and say it in one line."""
    words = str(error).strip() or type(error).__name__
    expected = isinstance(error, UserError | CompileError | OutOfTimeError)
    if not expected:
        words = f"{type(error).__name__}: {words}"
        if not lost_a_peer(error):
            traceback.print_exception(error)
    get_error_handler().record_exception(type(error)(words) if expected else error)
    return WorkFailedError(f"rank {rank}: {words}", 2 if isinstance(error, UserError) else 1)


def end_process(rank: int, error: Exception) -> NoReturn:
    """End this process from whatever thread, wherever its other threads are."""
    failure = rank_failure(rank, error)
    say_error(str(failure))
    os._exit(failure.exit_code)
