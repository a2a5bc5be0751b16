"""Progress of long work: a bar on a terminal, or else a plain line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_PLAIN_EVERY_SECONDS = 5.0

Show = Callable[[int, int, float], None]
"""Called with (items done, items in total, fraction of the work done)."""


@contextmanager
def progress(what: str) -> Iterator[Show]:
    """Yield a function that shows progress, rate and time left on standard error."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield _plain_lines(what)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), TextColumn("{task.fields[words]}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    task = bar.add_task(what, total=1.0, words="")
    started = time.monotonic()

    def show(done: int, total: int, fraction: float) -> None:
        bar.start()  # only once there is something to show
        rate = done / max(1e-6, time.monotonic() - started)
        bar.update(task, completed=fraction, words=f"{done}/{total} {rate:.1f}/s")

    try:
        yield show
    finally:
        bar.stop()


def counting(show: Show) -> Callable[[int, int], None]:
    """Show the progress of work whose items all cost about the same."""
    return lambda done, total: show(done, total, done / total)


def _plain_lines(what: str) -> Show:
    """Show progress as a line every few seconds at most, and one at the end."""
    started = last = time.monotonic()
    ended = False

    def show(done: int, total: int, fraction: float) -> None:
        nonlocal last, ended
        now = time.monotonic()
        ends = done == total and not ended
        if not ends and now - last < _PLAIN_EVERY_SECONDS:
            return
        last, ended = now, ends
        elapsed = max(1e-6, now - started)
        left = elapsed / fraction - elapsed if fraction else 0.0
        line = f"{what}: {done} of {total}, {done / elapsed:.1f}/s, {left:.0f} s left"
        with suppress(OSError, ValueError):  # The work goes on if nobody reads this.
            print(line, file=sys.stderr, flush=True)

    return show
