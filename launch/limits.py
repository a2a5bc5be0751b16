"""How long a rank may take, and how it ends when something takes longer or fails."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from runner.build.compiler import CompileError
from runner.errors import UserError, WorkFailedError, print_error
from runner.schedule import OF_HOSTS, Begin, Collective, Message
from runner.watch.shim import read_unfinished

_TIMEOUT_MESSAGES = (
    "Timed out waiting",
    "Operation timed out!",
    "Application timeout caused pair closure",
    "timed out after",
    "wait timeout after",
    "Wait timeout",
    "Timeout waiting for key",
)
"""What gloo and torch's stores say of a wait that was too long."""

_LOST_PEER_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL communicator was",
)

_POLL_SECONDS = 0.1


class OutOfTimeError(Exception):
    """Something took longer than its limit."""


class CommunicationTimeoutError(OutOfTimeError):
    """A communication took longer than its limit."""


def is_timeout(error: Exception) -> bool:
    """Whether an error of torch.distributed is a time-out."""
    return isinstance(error, RuntimeError) and any(
        message in str(error) for message in _TIMEOUT_MESSAGES
    )


def lost_a_peer(error: Exception) -> bool:
    """Whether a rank failed only because another one was gone."""
    return any(message in str(error) for message in _LOST_PEER_MESSAGES)


def rank_failure(rank: int, error: Exception) -> WorkFailedError:
    """Leave the error where torch's launcher looks for it, and return it in one line."""
    text = str(error).strip() or type(error).__name__
    expected = isinstance(error, UserError | CompileError | OutOfTimeError)
    if not expected:
        text = f"{type(error).__name__}: {text}"
        if not lost_a_peer(error):
            traceback.print_exception(error)
    # If the launcher's file cannot be written, our own line has to do.
    with suppress(OSError):
        get_error_handler().record_exception(type(error)(text) if expected else error)
    return WorkFailedError(f"rank {rank}: {text}", 2 if isinstance(error, UserError) else 1)


def end_process(rank: int, error: Exception) -> NoReturn:
    """End this process from any thread, wherever its other threads are."""
    try:
        print_error(str(rank_failure(rank, error)))
    finally:
        os._exit(1)


class Operating(Protocol):
    """What knows the operation that a rank is in."""

    last: str


class Deadline:
    """Ends the process when its run takes longer than ``seconds``, saying what it was doing.

    The time starts at once and stops at the end of the block.
    """

    def __init__(self, seconds: float, rank: int) -> None:
        self.sink: Operating | None = None
        self._seconds, self._rank = seconds, rank
        self._timer = threading.Timer(seconds, self._abort)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> Deadline:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _abort(self) -> None:
        where = self.sink.last if self.sink else "setting up"
        error = OutOfTimeError(f"no end after --timeout {self._seconds:g} s, in: {where}")
        end_process(self._rank, error)


@dataclass(frozen=True)
class WaitingRank:
    """A rank that may wait too long, and what it can find out about the ranks it waits for.

    Attributes:
        rank: world rank.
        seconds: longest wait.
        log_dir: where this host's compiles are recorded.
        host_ranks: ranks of this host; what others do cannot be seen from it.
    """

    rank: int
    seconds: float
    log_dir: Path
    host_ranks: range

    def timeout_error(self, op: Message) -> CommunicationTimeoutError:
        """Name the operation, the ranks it waits for, and what they are compiling.

        If none of those compiles, they wait for ranks that do.
        """
        group = op.group if isinstance(op, Collective | Begin) else (op.peer,)
        others = [peer for peer in group if peer != self.rank]
        compiling = {
            record.rank: record.kernel_name
            for record in read_unfinished(self.log_dir)
            if record.rank >= 0
        }
        awaited = {peer: name for peer, name in compiling.items() if peer in others}
        reasons = "; ".join(
            f"rank {peer} compiles {name}" for peer, name in (awaited or compiling).items()
        )
        if not awaited:
            away = [peer for peer in others if peer not in self.host_ranks]
            unseen = f"{_listed(away)} cannot be seen from this host"
            idle = unseen if away else "none of them is compiling"
            reasons = f"{idle}, but {reasons}" if reasons else idle
        return CommunicationTimeoutError(
            f"{op.name} waited {self.seconds:g} s for {_listed(others)}, the limit of "
            f"--nccl-timeout: {reasons}"
        )


def _listed(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


class WaitLimit:
    """Limits waits over gloo, which ends them itself, with an error that says too little.

    An asynchronous collective ends where it is awaited.
    """

    def __init__(self, waiting: WaitingRank) -> None:
        self._waiting = waiting

    @contextmanager
    def over(self, op: Message) -> Iterator[None]:
        """This rank is in ``op`` until the block ends."""
        try:
            yield
        except Exception as error:
            if not is_timeout(error):
                raise
            raise self._waiting.timeout_error(op) from error

    def started(self, op: Message, is_done: Callable[[], bool]) -> None:
        """``op`` goes on while the rank does something else, until ``is_done``."""

    def quiet(self) -> AbstractContextManager[object]:
        """Until the block ends no thread asks the GPU anything: that would spoil a capture."""
        return nullcontext()


class NcclWaitLimit(WaitLimit):
    """Limits waits over NCCL by a thread that ends the process.

    The host may never return: NCCL connects two ranks inside the call of their first message, and
    returns when the other one is there. torch's own watchdog sees only what was queued by then,
    and needs another minute to end a process. What the hosts do among themselves goes over gloo.
    """

    def __init__(self, waiting: WaitingRank) -> None:
        super().__init__(waiting)
        self._waits: list[tuple[float, Message, Callable[[], bool]]] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="wait limit", daemon=True).start()

    @contextmanager
    def over(self, op: Message) -> Iterator[None]:
        if op.name in OF_HOSTS:
            with super().over(op):
                yield
            return
        returned = threading.Event()
        self.started(op, returned.is_set)
        try:
            yield
        finally:
            returned.set()

    def started(self, op: Message, is_done: Callable[[], bool]) -> None:
        with self._lock:
            self._waits.append((time.monotonic(), op, is_done))

    def quiet(self) -> AbstractContextManager[object]:
        return self._lock

    def _watch(self) -> None:
        while True:
            with self._lock:
                self._waits = [wait for wait in self._waits if not _is_done(wait[2])]
                waits = self._waits
            # They are in the order of their starts.
            if waits and time.monotonic() - waits[0][0] > self._waiting.seconds:
                end_process(self._waiting.rank, self._error(waits[0][1]))
                return
            time.sleep(_POLL_SECONDS)

    def _error(self, op: Message) -> Exception:
        try:
            return self._waiting.timeout_error(op)
        except Exception as error:
            # Ending the wait matters more than what the others compile.
            return OutOfTimeError(f"{op.name} waited {self._waiting.seconds:g} s ({error})")


def _is_done(query: Callable[[], bool]) -> bool:
    try:
        return query()
    except RuntimeError:
        # The GPU failed; the host will find out itself.
        return True
