"""Locks on a cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runner.errors import UserError
from runner.files import take_lock


@contextmanager
def locked(
    cache_dir: Path,
    *,
    wait: bool = True,
    shared: bool = False,
    on_wait: Callable[[Path], None] = lambda cache_dir: None,
) -> Iterator[bool | None]:
    """Hold the lock that builders of a cache take; the library itself does not take it.

    Builders that each build different kernels hold it ``shared`` and do not exclude each other.
    ``on_wait`` is called before this waits for another holder.

    Raises:
        UserError: the directory cannot be written.
    """
    try:
        file = (cache_dir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot lock {cache_dir}: {error.strerror}") from None
    with file:
        taken = take_lock(file, cache_dir, shared=shared, wait=False)
        if taken is False and wait:
            on_wait(cache_dir)
            taken = take_lock(file, cache_dir, shared=shared)
        yield taken


def say_waiting(cache_dir: Path) -> None:
    """Say that another process holds the lock of a cache."""
    print(f"another builder is at work in {cache_dir}: waiting for it", file=sys.stderr, flush=True)


@contextmanager
def folder_lock(folder: Path, cache_dir: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder itself, for a short time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        take_lock(descriptor, cache_dir)
        yield
    finally:
        os.close(descriptor)
