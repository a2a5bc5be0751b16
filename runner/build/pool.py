"""Worker threads that always take the task with the longest way to the end."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable


class Pool:
    """Runs tasks, which may add tasks, on a number of threads."""

    def __init__(
        self, workers: int, on_step: Callable[[float, float], None] = lambda done, expected: None
    ) -> None:
        """Make a pool.

        Args:
            workers: threads.
            on_step: told (seconds of work done, seconds expected in all) after each task.
        """
        self._workers, self._on_step = workers, on_step
        self._done = self._expected = 0.0
        self._tasks: list[tuple[float, int, float, Callable[[], None]]] = []
        self._open = 0
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def expect(self, seconds: float) -> None:
        """Count work that tasks will add."""
        with self._changed:
            self._expected += seconds

    def add(self, to_end: float, task: Callable[[], None], *, own: float) -> None:
        """Queue a task.

        Args:
            to_end: seconds from its start to the end of all that follows from it.
            task: what to do.
            own: seconds of its own work, counted by :meth:`expect` before.
        """
        with self._changed:
            self._open += 1
            heapq.heappush(self._tasks, (-to_end, next(self._order), own, task))
            self._changed.notify()

    def drain(self) -> None:
        """Run until every task is done.

        Raises:
            BaseException: the first that a task raised; tasks that had not begun are dropped.
        """
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:
            self._stop(error)
            raise
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (item := self._next()) is not None:
            seconds, task = item
            try:
                task()
                self._on_step(self._done + seconds, self._expected)
            except BaseException as error:  # it is raised again by drain
                self._stop(error)
            with self._changed:
                self._open -= 1
                self._done += seconds
                self._changed.notify_all()

    def _next(self) -> tuple[float, Callable[[], None]] | None:
        with self._changed:
            while not self._tasks and self._open and self._error is None:
                self._changed.wait()
            if self._error is not None or not self._open:
                self._changed.notify_all()
                return None
            _, _, seconds, task = heapq.heappop(self._tasks)
            return seconds, task

    def _stop(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()
