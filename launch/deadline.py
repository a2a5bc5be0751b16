"""The end of a run that takes too long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol


class OutOfTimeError(Exception):
    """Something took longer than its limit."""


class Standing(Protocol):
    """Something that knows what a rank is at."""

    last: str


class Deadline:
    """Ends the process when a run takes longer than its limit, saying where it stood.

    Args:
        seconds: the limit.
        end: ends the process, wherever it is, telling of the error.
    """

    def __init__(self, seconds: float, end: Callable[[Exception], object]) -> None:
        self.sink: Standing | None = None
        self._seconds, self._end = seconds, end
        self._timer = threading.Timer(seconds, self._abort)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> Deadline:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _abort(self) -> None:
        where = self.sink.last if self.sink else "setting up"
        self._end(OutOfTimeError(f"no end after --timeout {self._seconds:g} s, in: {where}"))
