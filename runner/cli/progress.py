"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PLAIN_EVERY_SECONDS = 5.0


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function to be told (done, total); shows rate and time left on standard error."""
    if not sys.stderr.isatty():
        yield _Plain(what)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    rate_column = TextColumn("{task.fields[rate]}")
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), rate_column, Remaining())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None, rate="")
        started = time.monotonic()

        def show(done: int, total: int) -> None:
            rate = done / max(1e-6, time.monotonic() - started)
            bar.update(task, completed=done, total=total, rate=f"{rate:.1f}/s")

        yield show


class _Plain:
    """Prints a line at most every few seconds, and one at the end."""

    def __init__(self, what: str) -> None:
        self._what, self._started, self._last = what, time.monotonic(), time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._last < _PLAIN_EVERY_SECONDS:
            return
        self._last = now
        elapsed = max(1e-6, now - self._started)
        rate = done / elapsed
        left = (total - done) / rate if rate else 0.0
        print(
            f"{self._what}: {done} of {total}, {rate:.1f}/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
