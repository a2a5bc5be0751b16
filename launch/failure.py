"""How a rank that failed says so, in one line and where torch's launcher looks for it."""

from __future__ import annotations

import os
import traceback
from contextlib import suppress
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from launch.deadline import OutOfTimeError
from runner.build.compiler import CompileError
from runner.errors import UserError, WorkFailedError, print_error

_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "NCCL communicator was")


def lost_a_peer(error: Exception) -> bool:
    """Whether a rank failed only because another one was gone."""
    return any(words in str(error) for words in _PEER_WORDS)


def rank_failure(rank: int, error: Exception) -> WorkFailedError:
    """Leave the error where torch's launcher looks for it, and say it in one line."""
    words = str(error).strip() or type(error).__name__
    expected = isinstance(error, UserError | CompileError | OutOfTimeError)
    if not expected:
        words = f"{type(error).__name__}: {words}"
        if not lost_a_peer(error):
            traceback.print_exception(error)
    # Where its file cannot be written, our own line has to do.
    with suppress(OSError):
        get_error_handler().record_exception(type(error)(words) if expected else error)
    return WorkFailedError(f"rank {rank}: {words}", 2 if isinstance(error, UserError) else 1)


def end_process(rank: int, error: Exception) -> NoReturn:
    """End this process from whatever thread, wherever its other threads are and whoever listens."""
    try:
        print_error(str(rank_failure(rank, error)))
    finally:
        os._exit(1)
