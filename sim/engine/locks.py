"""Locks of a node: one holder at a time, in the order of asking."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

Granted = Callable[[float], None]


class Locks:
    """Locks by key; None is no lock and is granted at once.

    ``at(time, action)`` schedules ``action(time)``.
    """

    def __init__(self, at: Callable[[float, Granted], None]) -> None:
        self._at = at
        self._queues: dict[Hashable, deque[tuple[float, Granted, Callable[[float, float], None]]]]
        self._queues = {}

    def acquire(
        self,
        key: Hashable,
        time: float,
        granted: Granted,
        waited: Callable[[float, float], None],
    ) -> None:
        """Call ``granted(when)`` once the lock is free; ``waited(since, when)`` before that."""
        if key is None:
            granted(time)
        elif key not in self._queues:
            self._queues[key] = deque()
            granted(time)
        else:
            self._queues[key].append((time, granted, waited))

    def release(self, key: Hashable, time: float) -> None:
        """Hand the lock to who asked first of those who wait."""
        if key is None:
            return
        queue = self._queues[key]
        if not queue:
            del self._queues[key]
            return
        since, granted, waited = queue.popleft()
        waited(since, time)
        self._at(time, granted)
