"""Worker threads that always take the task with the most work still behind it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from queue import PriorityQueue


class TaskPool:
    """Runs tasks, which may add tasks, on a number of threads."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._tasks: PriorityQueue[tuple[float, int, Callable[[], None] | None]] = PriorityQueue()
        self._order = itertools.count()
        self._error: BaseException | None = None

    def add(self, seconds_to_end: float, task: Callable[[], None]) -> None:
        """Queue a task; the one with the most seconds to the end of all that follows goes first."""
        self._tasks.put((-seconds_to_end, next(self._order), task))

    def run(self) -> None:
        """Run until every task is done.

        Raises:
            BaseException: the first that a task raised; tasks that had not begun are dropped.
        """
        for _ in range(self._workers):
            threading.Thread(target=self._work, daemon=True).start()
        try:
            self._tasks.join()
        except BaseException as error:  # An interrupt: whatever runs is left to itself.
            self._error = error
            raise
        finally:
            for _ in range(self._workers):
                self._tasks.put((float("inf"), next(self._order), None))
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (task := self._tasks.get()[2]) is not None:
            try:
                if self._error is None:
                    task()
            except BaseException as error:  # run raises it
                self._error = self._error or error
            finally:
                self._tasks.task_done()
