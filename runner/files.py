"""Write results where the user asked, read JSON, and lock files where the file system can."""

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
    """Yield a temporary path whose file replaces ``path`` at the end, or is removed on an error.

    A symlink stays, and the file that it points to is replaced. A device, a pipe or a file that
    cannot be replaced is yielded itself.
    """
    final = Path(os.path.realpath(path))
    if is_special(path) or final.is_mount() or not os.access(final.parent, os.W_OK):
        yield path
        return
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        yield temporary
        if final.exists():
            temporary.chmod(final.stat().st_mode)
        temporary.rename(final)
    finally:
        temporary.unlink(missing_ok=True)


def is_special(path: Path) -> bool:
    """Whether there is something other than a regular file, such as a device or a pipe."""
    return path.exists() and not path.is_file()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` and a newline to ``path``; ``-`` is standard output.

    Raises:
        UserError: the file cannot be written.
    """
    if str(path) == "-":
        print(text)
        return
    try:
        with replacing(path) as temporary:
            temporary.write_text(text + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def write_json(path: Path, data: Any, *, indent: int | None = None) -> None:
    """Write plain data as :func:`write_text` does, on one line unless ``indent`` is given.

    Raises:
        UserError: the file cannot be written, or a number is not finite, which JSON cannot express.
    """
    separators = (",", ":") if indent is None else None
    try:
        text = json.dumps(data, indent=indent, separators=separators, allow_nan=False)
    except ValueError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    write_text(path, text)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of any origin.

    Raises:
        ValueError: not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


_NOT_SUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
"""Errors of ``flock`` on file systems without locks; NFS gives EBADF for a folder."""


def take_lock(
    file: IO[str] | int, folder: Path, *, shared: bool = False, wait: bool = True
) -> bool | None:
    """Lock an open file until it is closed or its process ends.

    Returns:
        True if the lock was taken, False if another process holds it and ``wait`` is off. None if
        the file system has no locks: this warns once for each ``folder``, and the caller goes on.
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
            stacklevel=1,  # Python then shows it once per folder.
        )
        return None
    return True
