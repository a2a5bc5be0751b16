"""Locks on a cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runner.errors import UserError
from runner.files import take_lock


@contextmanager
def locked(cache_dir: Path, *, wait: bool = True, shared: bool = False) -> Iterator[bool | None]:
    """Hold the lock that builders of a cache take; the library itself does not take it.

    Builders that each build different kernels hold it ``shared`` and do not exclude each other.

    Raises:
        UserError: the directory cannot be written.
    """
    try:
        file = (cache_dir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot lock {cache_dir}: {error.strerror}") from None
    with file:
        yield take_lock(file, cache_dir, shared=shared, wait=wait)


@contextmanager
def folder_lock(folder: Path, cache_dir: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder itself, for a short time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        take_lock(descriptor, cache_dir)
        yield
    finally:
        os.close(descriptor)
