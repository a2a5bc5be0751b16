"""File locks, and what to do on file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from runner.errors import UserError

_NOT_SUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
"""What ``flock`` fails with where there are no locks; EBADF is NFS's answer for a folder."""


def take_lock(
    file: IO[str] | int, folder: Path, *, shared: bool = False, wait: bool = True
) -> bool | None:
    """Lock an open file until it is closed, however its process ends.

    Returns:
        Whether it was taken: False if another process holds it and ``wait`` is off. None where the
        file system has no locks: one warning for each ``folder`` says so, and the caller goes on.
    """
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, operation if wait else operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        warnings.warn(
            f"the file system of {folder} has no file locks: use it from one process at a time",
            stacklevel=1,  # So that Python shows it once for each folder.
        )
        return None
    return True


@contextmanager
def locked(cache_dir: Path, *, wait: bool = True, shared: bool = False) -> Iterator[bool | None]:
    """Hold a cache's lock among builders; the library itself does not take it.

    Builders that hold it ``shared``, each with kernels of its own to build, do not exclude each
    other.

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
    """Hold a lock on a folder itself, for a moment, exclusively."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        take_lock(descriptor, cache_dir)
        yield
    finally:
        os.close(descriptor)
