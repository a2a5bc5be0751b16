"""A node's CPU cores, shared by the compiles that run on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _Job:
    remaining: float
    done: Callable[[float], None]


class Cores:
    """Processor sharing: each of ``n`` jobs takes ``slowdown(n)`` times as long as alone.

    The owner asks for :meth:`next_end` after every change and calls :meth:`finish` at that time;
    ``version`` changes with every change, so that an end computed before one can be recognised.
    """

    def __init__(self, slowdown: Callable[[int], float]) -> None:
        self._slowdown = slowdown
        self._jobs: dict[int, _Job] = {}
        self._now = 0.0
        self._next_id = 0
        self.version = 0

    def start(self, now: float, seconds: float, done: Callable[[float], None]) -> None:
        """Start a job that takes ``seconds`` alone; ``done(end)`` is called."""
        self._advance(now)
        self._jobs[self._next_id] = _Job(seconds, done)
        self._next_id += 1

    def next_end(self) -> float | None:
        """When the first of the running jobs ends if nothing else changes."""
        if not self._jobs:
            return None
        shortest = min(job.remaining for job in self._jobs.values())
        return self._now + shortest * self._slowdown(len(self._jobs))

    def finish(self, now: float) -> None:
        """End the jobs that are done at ``now``, in the order they started."""
        self._advance(now)
        ended = [key for key, job in self._jobs.items() if job.remaining <= _TINY]
        jobs = [self._jobs.pop(key) for key in ended]
        for job in jobs:
            job.done(now)

    def _advance(self, now: float) -> None:
        if self._jobs:
            worked = (now - self._now) / self._slowdown(len(self._jobs))
            for job in self._jobs.values():
                job.remaining -= worked
        self._now = now
        self.version += 1


_TINY = 1e-9
