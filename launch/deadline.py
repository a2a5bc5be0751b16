"""The end of a run that takes too long."""

from __future__ import annotations

import os
import threading
from typing import Protocol


class Standing(Protocol):
    """Something that knows what a rank is at."""

    last: str


class Deadline:
    """Ends the process when a run takes longer than its limit, saying where it stood."""

    def __init__(self, seconds: float, rank: int) -> None:
        self.sink: Standing | None = None
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
        print(
            f"[rank {self._rank}] error: no end after --timeout {self._seconds:g} s, in: {where}",
            flush=True,
        )
        os._exit(1)
