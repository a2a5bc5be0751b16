"""Time limits of a rank, and how it ends when it exceeds one or fails."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from runner.build.compiler import CompileError
from runner.errors import UserError, WorkFailedError, print_error
from runner.schedule import Begin, Collective, Message
from runner.watch.shim import read_unfinished

_LOST_PEER_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL communicator was",
)

_POLL_SECONDS = 0.1


class OutOfTimeError(Exception):
    """A run or a communication took longer than its limit."""


class CommunicationTimeoutError(OutOfTimeError):
    """A communication took longer than its limit."""


def lost_a_peer(error: Exception) -> bool:
    """Whether a rank failed only because another rank was gone."""
    return any(message in str(error) for message in _LOST_PEER_MESSAGES)


def rank_failure(rank: int, error: Exception) -> WorkFailedError:
    """Record the error where torch's launcher looks for it, and return it as one line."""
    text = str(error).strip() or type(error).__name__
    expected = isinstance(error, UserError | CompileError | OutOfTimeError)
    if not expected:
        text = f"{type(error).__name__}: {text}"
        if not lost_a_peer(error):
            traceback.print_exception(error)
    # If the launcher's file cannot be written, our own line still reports the error.
    with suppress(OSError):
        get_error_handler().record_exception(type(error)(text) if expected else error)
    return WorkFailedError(f"rank {rank}: {text}", 2 if isinstance(error, UserError) else 1)


def end_process(rank: int, error: Exception) -> NoReturn:
    """End this process from any thread, whatever the other threads are doing."""
    try:
        print_error(str(rank_failure(rank, error)))
    finally:
        os._exit(1)


class Deadline:
    """Ends the process when its run takes longer than ``seconds``, and says what it was doing.

    The clock starts at construction and stops when the ``with`` block ends.

    Attributes:
        where: returns what the run is doing.
    """

    def __init__(self, seconds: float, rank: int) -> None:
        self.where: Callable[[], str] = lambda: "setting up"
        self._seconds, self._rank = seconds, rank
        self._timer = threading.Timer(seconds, self._abort)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> Deadline:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _abort(self) -> None:
        error = OutOfTimeError(
            f"not finished after --timeout {self._seconds:g} s, in: {self.where()}"
        )
        end_process(self._rank, error)


class WaitLimit:
    """Ends the process when a communication takes longer than a limit.

    A separate thread watches, because the main thread may never return: NCCL connects two ranks
    inside the call that sends their first message, and returns only once the peer is there.
    torch's own timeout message comes later and says less.

    Args:
        rank: world rank.
        seconds: longest wait.
        log_dir: where this host's compiles are recorded.
        host_ranks: ranks on this host; it cannot see what other ranks compile.
    """

    def __init__(self, rank: int, seconds: float, log_dir: Path, host_ranks: range) -> None:
        self._rank, self._seconds = rank, seconds
        self._log_dir, self._host_ranks = log_dir, host_ranks
        self._waits: list[tuple[float, Message, Callable[[], bool]]] = []
        self.quiet = threading.Lock()
        """While it is held, no thread queries the GPU: a query would break a graph capture."""
        threading.Thread(target=self._watch, name="wait limit", daemon=True).start()

    @contextmanager
    def over(self, op: Message) -> Iterator[None]:
        """Watch ``op``, which this rank is in until the block ends."""
        returned = threading.Event()
        self.started(op, returned.is_set)
        try:
            yield
        finally:
            returned.set()

    def started(self, op: Message, is_done: Callable[[], bool]) -> None:
        """Watch ``op``, which runs in the background until ``is_done``."""
        with self.quiet:
            self._waits.append((time.monotonic(), op, is_done))

    def _watch(self) -> None:
        while True:
            with self.quiet:
                self._waits = [wait for wait in self._waits if not _is_done(wait[2])]
                waits = self._waits
            # The oldest wait comes first.
            if waits and time.monotonic() - waits[0][0] > self._seconds:
                end_process(self._rank, self.timeout_error(waits[0][1]))
                return
            time.sleep(_POLL_SECONDS)

    def timeout_error(self, op: Message) -> CommunicationTimeoutError:
        """Name the operation, the ranks it waits for, and what they are compiling."""
        group = op.group if isinstance(op, Collective | Begin) else (op.peer,)
        others = [peer for peer in group if peer != self._rank]
        try:
            reasons = self._reasons(others)
        except (OSError, ValueError) as error:
            # Ending the wait matters more than naming what the others compile.
            reasons = str(error)
        return CommunicationTimeoutError(
            f"{op.name} waited {self._seconds:g} s for {_listed(others)}, the limit of "
            f"--nccl-timeout: {reasons}"
        )

    def _reasons(self, others: Sequence[int]) -> str:
        """What the awaited ranks are compiling; if nothing, what other ranks are compiling."""
        compiling = {
            record.rank: record.kernel_name
            for record in read_unfinished(self._log_dir)
            if record.rank >= 0
        }
        awaited = {peer: name for peer, name in compiling.items() if peer in others}
        reasons = "; ".join(
            f"rank {peer} compiles {name}" for peer, name in (awaited or compiling).items()
        )
        if awaited:
            return reasons
        away = [peer for peer in others if peer not in self._host_ranks]
        idle = "none of them is compiling"
        if away:
            idle = f"{_listed(away)} cannot be seen from this host"
        return f"{idle}, but {reasons}" if reasons else idle


def _listed(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _is_done(query: Callable[[], bool]) -> bool:
    try:
        return query()
    except RuntimeError:
        # The GPU failed; the main thread will raise that error itself.
        return True
