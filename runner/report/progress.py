"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SECONDS_BETWEEN_LINES = 5.0

Show = Callable[[int, int, float], None]
"""Shows (items done, items in all, fraction of the work done)."""


@contextmanager
def progress(what: str) -> Iterator[Show]:
    """Yield a function that shows how far the work is, its rate and the time left, on stderr."""
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
    """Prints a line every few seconds, and one at the end."""

    def __init__(self, what: str) -> None:
        self._what, self._started, self._last = what, time.monotonic(), time.monotonic()
        self._ended = False

    def __call__(self, done: int, total: int, fraction: float) -> None:
        now = time.monotonic()
        ends = done == total and not self._ended
        if not ends and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last, self._ended = now, ends
        elapsed = max(1e-6, now - self._started)
        left = elapsed / fraction - elapsed if fraction else 0.0
        _say(f"{self._what}: {done} of {total}, {done / elapsed:.1f}/s, {left:.0f} s left")


def _say(line: str) -> None:
    """Print to standard error; a reader that is gone changes neither the work nor its exit code."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        # Python would try to flush the unwritten line again at its exit, and end with code 120.
        with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stderr.fileno())


def counting(show: Show) -> Callable[[int, int], None]:
    """Show progress of work whose items all cost about the same."""
    return lambda done, total: show(done, total, done / total)
