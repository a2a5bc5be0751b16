"""Writing results where the user asked for them; file locks, and file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from runner.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path, whose file takes the place of ``path`` at the end; gone after an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` and a newline to ``path``; ``-`` is standard output.

    Raises:
        UserError: the file cannot be written.
    """
    if str(path) == "-":
        print(text)
        return
    try:
        path.write_text(text + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def write_json(path: Path, data: Any, *, indent: int | None = None) -> None:
    """Write plain data as :func:`write_text` does, on one line unless ``indent`` is given.

    Raises:
        UserError: the file cannot be written, or a number is not finite, which JSON has no word
            for.
    """
    separators = (",", ":") if indent is None else None
    try:
        text = json.dumps(data, indent=indent, separators=separators, allow_nan=False)
    except ValueError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    write_text(path, text)


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
