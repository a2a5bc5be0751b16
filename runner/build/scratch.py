"""Folders for a build's files on the way; those of builds that were killed go with the next one."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "deepgemm-build-"
_NEW_PREFIX = "deepgemm-new-"
_LOCK = ".lock"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new empty folder in the system's temporary directory, gone after the block."""
    where = Path(tempfile.gettempdir())
    _clear_abandoned(where)
    # Only once it is locked it takes the name by which abandoned ones are looked for.
    new = Path(tempfile.mkdtemp(prefix=_NEW_PREFIX)).resolve()
    folder = new.with_name(new.name.replace(_NEW_PREFIX, _PREFIX))
    # The lock is held as long as this process lives, whatever container it lives in.
    with (new / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        new.rename(folder)
        try:
            (folder / "work").mkdir()
            yield folder / "work"
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _clear_abandoned(where: Path) -> None:
    for folder in where.glob(f"{_PREFIX}*"):
        with suppress(OSError), (folder / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
