"""Reserves GPUs for tests that run concurrently: one test at a time uses each GPU.

Every worker of pytest-xdist, and every other process that shares the folder, takes the same locks.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

_POLL = 0.05


class GpuPool:
    """The machine's GPUs, with a lock file for each.

    Args:
        count: number of GPUs.
        folder: where the lock files are; the same for all processes that share the GPUs.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self._folder = count, folder

    @contextmanager
    def take(self, wanted: int) -> Iterator[list[int]]:
        """Wait until ``wanted`` GPUs are free and hold them inside the block.

        It takes all of them or none, so two waiting tests cannot deadlock.

        Raises:
            ValueError: ``wanted`` is below 1 or above the number of GPUs.
        """
        if not 1 <= wanted <= self.count:
            raise ValueError(f"{wanted} GPUs are wanted of {self.count}")
        while True:
            with ExitStack() as held:
                taken = self._take_free(wanted, held)
                if len(taken) == wanted:
                    yield taken
                    return
            time.sleep(_POLL)

    def _take_free(self, wanted: int, held: ExitStack) -> list[int]:
        taken: list[int] = []
        for gpu in range(self.count):
            if len(taken) < wanted and _locked(held.enter_context(self._file(gpu))):
                taken.append(gpu)
        return taken

    def _file(self, gpu: int) -> IO[str]:
        return (self._folder / f"gpu-{gpu}.lock").open("w")


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
