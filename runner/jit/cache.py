"""The disk cache, laid out as DeepGEMM lays it out, so that the library hits what we build.

``<cache_dir>/cache/kernel.<name>.<hex>/{kernel.cu,kernel.cubin}``; entries appear whole.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runner.errors import UserError
from runner.jit.cubin import NotACubinError, kernels_in


@dataclass(frozen=True)
class KernelCache:
    """One cache directory (``DG_JIT_CACHE_DIR``)."""

    root: Path

    def prepare(self) -> None:
        """Create the directory.

        Raises:
            UserError: it cannot be created or written.
        """
        probe = self.root / "tmp" / f"probe-{os.getpid()}-{uuid.uuid4().hex}"
        try:
            probe.mkdir(parents=True)
            probe.rmdir()
        except OSError as error:
            raise UserError(
                f"cache directory {self.root} cannot be written ({error.strerror}): "
                "choose another with --cache-dir or DG_JIT_CACHE_DIR"
            ) from None

    def entries(self) -> list[Path]:
        """Everything that lies where entries lie, whole or not, ordered by name."""
        folder = self.root / "cache"
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def count(self) -> int:
        """Number of entries."""
        return len(self.entries())

    def entry(self, key: str) -> Path:
        """Directory of a kernel, whether it exists or not."""
        return self.root / "cache" / key

    def has(self, key: str) -> bool:
        """Whether the kernel is there.

        Raises:
            UserError: the directory exists but is not whole; the library would abort on it.
        """
        entry = self.entry(key)
        if not entry.exists():
            return False
        if not ((entry / "kernel.cu").is_file() and (entry / "kernel.cubin").is_file()):
            raise UserError(
                f"corrupted cache entry {entry}: kernel.cu or kernel.cubin is missing; remove it"
            )
        return True

    def holds(self, key: str, source: str) -> bool:
        """Whether the entry is there, whole, and of exactly this source."""
        entry = self.entry(key)
        try:
            same = (entry / "kernel.cu").read_bytes() == source.encode()
            return same and len(kernels_in((entry / "kernel.cubin").read_bytes())) == 1
        except (OSError, NotACubinError):
            return False

    def add(
        self, key: str, source: str, build: Callable[[Path, Path, Path], None], *, tag: str = ""
    ) -> bool:
        """Build an entry in a temporary directory and move it into place.

        Args:
            key: the entry's name.
            source: text of ``kernel.cu``.
            build: called with (source path, cubin path to write, working directory).
            tag: begins the temporary directory's name.

        Returns:
            True where this call's entry was taken, False where another process was first.
        """
        work_dir = self.root.absolute() / "tmp"  # the compiler runs elsewhere
        temporary = work_dir / f"{tag}{os.getpid()}-{uuid.uuid4().hex}"
        temporary.mkdir(parents=True)
        try:
            source_path, cubin_path = temporary / "kernel.cu", temporary / "kernel.cubin"
            source_path.write_text(source)
            build(source_path, cubin_path, work_dir)
            for path in (source_path, cubin_path, temporary):
                _fsync(path)
            final = self.entry(key)
            final.parent.mkdir(parents=True, exist_ok=True)
            return _rename(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def put(self, key: str, source: str, cubin: bytes, *, tag: str = "") -> bool:
        """Add an entry that was built elsewhere; see :meth:`add`."""

        def write(source_path: Path, cubin_path: Path, work_dir: Path) -> None:
            cubin_path.write_bytes(cubin)

        return self.add(key, source, write, tag=tag)

    def discard(self, key: str) -> None:
        """Take an entry away in one step, whole or not; nothing happens where there is none."""
        away = self.root / "tmp" / f"discarded-{os.getpid()}-{uuid.uuid4().hex}"
        away.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.entry(key).rename(away)
        except FileNotFoundError:
            return
        if away.is_dir() and not away.is_symlink():
            shutil.rmtree(away)
        else:
            away.unlink()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(temporary: Path, final: Path) -> bool:
    try:
        temporary.rename(final)
    except OSError:
        if final.is_dir():
            return False
        raise
    return True
