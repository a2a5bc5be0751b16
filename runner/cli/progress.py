"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PLAIN_EVERY_SECONDS = 5.0


Show = Callable[[int, int, float], None]
"""Told (items done, of how many, fraction of the work done)."""


@contextmanager
def progress(what: str) -> Iterator[Show]:
    """Gives a function to be told how far work is; shows rate and time left on standard error."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield _Plain(what)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn(what), BarColumn(), TextColumn("{task.fields[words]}"), Remaining())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(what, total=1.0, words="")
    started = time.monotonic()

    def show(done: int, total: int, fraction: float) -> None:
        bar.start()  # not before there is something to show
        rate = done / max(1e-6, time.monotonic() - started)
        bar.update(task, completed=fraction, words=f"{done}/{total} {rate:.1f}/s")

    try:
        yield show
    finally:
        bar.stop()


class _Plain:
    """Prints a line at most every few seconds, and one at the end."""

    def __init__(self, what: str) -> None:
        self._what, self._started, self._last = what, time.monotonic(), time.monotonic()
        self._ended = False

    def __call__(self, done: int, total: int, fraction: float) -> None:
        now = time.monotonic()
        ends = done == total and not self._ended
        if not ends and now - self._last < _PLAIN_EVERY_SECONDS:
            return
        self._last, self._ended = now, ends
        elapsed = max(1e-6, now - self._started)
        left = elapsed / fraction - elapsed if fraction else 0.0
        _say(f"{self._what}: {done} of {total}, {done / elapsed:.1f}/s, {left:.0f} s left")


def _say(line: str) -> None:
    """Work must not end because nobody listens any more; nor may its exit code tell of that."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        # What was not written waits in a buffer, and Python exits with 120 where that fails again.
        with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stderr.fileno())


def counting(show: Show) -> Callable[[int, int], None]:
    """For work whose items cost about the same."""
    return lambda done, total: show(done, total, done / total)
