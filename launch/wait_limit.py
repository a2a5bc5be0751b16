"""How long a rank may be held up in a communication, and how it ends when it was for longer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from launch.comm import UnderWay
from launch.comm_stream import Ran
from launch.deadline import OutOfTimeError
from launch.watchdog import Communication, is_timeout
from runner.schedule import OF_HOSTS

Describe = Callable[[Communication], Exception]
"""Makes the error that says what of a communication took too long."""


class WaitLimit(Protocol):
    """Ends waits that are too long."""

    def over(self, op: Communication) -> AbstractContextManager[None]:
        """This rank is in ``op`` until the block ends."""

    def begun(self, op: Communication, handle: Any) -> None:
        """``op`` goes on beside what follows."""

    def quiet(self) -> AbstractContextManager[object]:
        """Nothing is asked of the GPU until the block ends."""


class NoLimit:
    """Ends nothing."""

    def over(self, op: Communication) -> AbstractContextManager[None]:
        """See the protocol."""
        return nullcontext()

    def begun(self, op: Communication, handle: Any) -> None:
        """See the protocol."""

    def quiet(self) -> AbstractContextManager[object]:
        """See the protocol."""
        return nullcontext()


class GlooLimit(NoLimit):
    """gloo ends its waits itself, with an error that says little; it is made one that says more.

    What goes on beside ends where it is awaited.
    """

    def __init__(self, describe: Describe) -> None:
        self._describe = describe

    @contextmanager
    def over(self, op: Communication) -> Iterator[None]:
        """See the protocol."""
        try:
            yield
        except Exception as error:
            if not is_timeout(error):
                raise
            raise self._describe(op) from error


class NcclLimit(GlooLimit):
    """A thread that ends the process, since the host may never come back to do so.

    NCCL connects ranks at their first message, inside the call: it returns when the other one is
    there. torch's own watchdog sees only what was queued by then, and needs a minute to end a
    process after that. What was begun beside holds up the GPU, wherever the host is. What hosts do
    among themselves goes over gloo all the same.

    Args:
        seconds: the limit.
        describe: makes the error that says more.
        end: ends the process, telling of the error.
    """

    def __init__(
        self, seconds: float, describe: Describe, end: Callable[[Exception], object]
    ) -> None:
        super().__init__(describe)
        self._seconds, self._end = seconds, end
        self._inside: tuple[Communication, float] | None = None
        self._beside: list[tuple[Communication, float, Callable[[], bool]]] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="wait limit", daemon=True).start()

    @contextmanager
    def over(self, op: Communication) -> Iterator[None]:
        """See the protocol."""
        if op.name in OF_HOSTS:
            with super().over(op):
                yield
            return
        self._inside = op, time.monotonic()
        try:
            yield
        finally:
            self._inside = None

    def begun(self, op: Communication, handle: UnderWay) -> None:
        """See the protocol."""
        assert isinstance(handle.work, Ran)
        with self._lock:
            self._beside.append((op, time.monotonic(), handle.work.done.query))

    def quiet(self) -> AbstractContextManager[object]:
        """See the protocol: a question from any thread would spoil a graph's capture."""
        return self._lock

    def _watch(self) -> None:
        while True:
            oldest = min(self._waits(), key=lambda wait: wait[1], default=None)
            left = _POLL if oldest is None else oldest[1] + self._seconds - time.monotonic()
            if oldest is not None and left <= 0:
                self._end(self._described(oldest[0]))
                return
            time.sleep(min(left, _POLL))

    def _described(self, op: Communication) -> Exception:
        try:
            return self._describe(op)
        except Exception as error:
            # What the others compile is worth less than the end of the wait.
            return OutOfTimeError(f"{op.name} waited {self._seconds:g} s ({error})")

    def _waits(self) -> list[tuple[Communication, float]]:
        """What is not done, and since when."""
        with self._lock:
            self._beside = [entry for entry in self._beside if not _is_done(entry[2])]
            waits = [(op, since) for op, since, _ in self._beside]
        inside = self._inside
        return waits if inside is None else [*waits, inside]


def _is_done(query: Callable[[], bool]) -> bool:
    try:
        return query()
    except RuntimeError:
        # An error of the GPU, which the host comes upon itself.
        return True


_POLL = 0.1
