"""The disk cache, laid out as DeepGEMM lays it out, so that the library hits what we build.

Entries lie in ``<cache_dir>/cache/`` and appear whole; :mod:`runner.cache.entry` has their forms.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from runner.build.cubin import NotACubinError, kernels_in
from runner.cache.entry import CUBIN, SOURCE, format_of
from runner.errors import UserError

_NOTHING: Mapping[str, bytes] = MappingProxyType({})


@dataclass(frozen=True)
class KernelCache:
    """One cache (``DG_JIT_CACHE_DIR``).

    Attributes:
        root: the directory that is written.
        below: more directories to find entries in, which are only read; the second generation
            takes ``DG_JIT_CACHE_DIR=writable:readonly:...``.
    """

    root: Path
    below: tuple[Path, ...] = ()

    @classmethod
    def of_text(cls, text: str) -> KernelCache:
        """The cache that a value of ``DG_JIT_CACHE_DIR`` names.

        Raises:
            UserError: one of its parts is empty.
        """
        parts = text.split(":")
        if not all(parts):
            raise UserError(
                f"cache directory {text!r} has an empty part: it must be DIR, or "
                "WRITABLE:READONLY:..."
            )
        root, *below = map(Path, parts)
        return cls(root, tuple(below))

    def check_generation(self, generation: int) -> None:
        """Raise UserError for a list of directories where a JIT reads but one."""
        if self.below and generation == 1:
            raise UserError(
                f"cache directory {self.text!r} is a list, which sgl-deep-gemm reads since 0.2.0: "
                "give one directory"
            )

    @property
    def text(self) -> str:
        """The value of ``DG_JIT_CACHE_DIR`` that names it, whatever the working directory."""
        return ":".join(str(path.absolute()) for path in (self.root, *self.below))

    def prepare(self) -> None:
        """Create the directory.

        Raises:
            UserError: it cannot be created or written.
        """
        probe = self.root / "tmp" / f"probe-{os.getpid()}-{uuid.uuid4().hex}"
        try:
            probe.mkdir(parents=True)
            probe.rmdir()
            (self.root / "cache").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cache directory {self.root} cannot be written ({error.strerror}): "
                "choose another with --cache-dir or DG_JIT_CACHE_DIR"
            ) from None

    def entries(self) -> list[Path]:
        """Everything that lies where entries lie, whole or not, ordered by name."""
        found: dict[str, Path] = {}
        for root in (self.root, *self.below):
            folder = root / "cache"
            for path in folder.iterdir() if folder.is_dir() else ():
                found.setdefault(path.name, path)
        return [found[name] for name in sorted(found)]

    def count(self) -> int:
        """Number of entries."""
        return len(self.entries())

    def entry(self, key: str) -> Path:
        """Directory of a kernel; where no place has it, the one where it would be written."""
        places = [root / "cache" / key for root in (self.root, *self.below)]
        return next((place for place in places if place.exists()), places[0])

    def has(self, key: str) -> bool:
        """Whether the kernel is there.

        Raises:
            UserError: the directory exists but is not whole; the library would abort on it.
        """
        entry = self.entry(key)
        if not entry.exists():
            return False
        form = format_of(key)
        lacking = [name for name in form.files if not (entry / name).is_file()] if form else []
        if lacking:
            raise UserError(
                f"corrupted cache entry {entry}: {' and '.join(lacking)} missing; remove it"
            )
        return True

    def holds(self, key: str, source: str) -> bool:
        """Whether the entry is there, whole, and of exactly this source."""
        entry = self.entry(key)
        form = format_of(key)
        try:
            same = (entry / SOURCE).read_bytes() == source.encode()
            whole = form is not None and all((entry / name).is_file() for name in form.files)
            return same and whole and len(kernels_in((entry / CUBIN).read_bytes())) == 1
        except (OSError, NotACubinError):
            return False

    def add(
        self,
        key: str,
        source: str,
        build: Callable[[Path, Path, Path], None],
        *,
        extra: Mapping[str, bytes] = _NOTHING,
        tag: str = "",
    ) -> bool:
        """Build an entry in a temporary directory and move it into place.

        Args:
            key: the entry's name.
            source: text of ``kernel.cu``.
            build: called with (source path, cubin path to write, working directory).
            extra: the entry's other files.
            tag: begins the temporary directory's name.

        Returns:
            True where this call's entry was taken, False where another process was first.
        """
        work_dir = self.root.absolute() / "tmp"  # the compiler runs elsewhere
        temporary = work_dir / f"{tag}{os.getpid()}-{uuid.uuid4().hex}"
        temporary.mkdir(parents=True)
        try:
            source_path, cubin_path = temporary / SOURCE, temporary / CUBIN
            source_path.write_bytes(source.encode())
            build(source_path, cubin_path, work_dir)
            for name, data in extra.items():
                (temporary / name).write_bytes(data)
            for path in (source_path, cubin_path, *map(temporary.joinpath, extra), temporary):
                _fsync(path)
            final = self.root / "cache" / key
            final.parent.mkdir(parents=True, exist_ok=True)
            return _rename(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def put(
        self,
        key: str,
        source: str,
        cubin: bytes,
        *,
        extra: Mapping[str, bytes] = _NOTHING,
        tag: str = "",
    ) -> bool:
        """Add an entry that was built elsewhere; see :meth:`add`."""

        def write(source_path: Path, cubin_path: Path, work_dir: Path) -> None:
            cubin_path.write_bytes(cubin)

        return self.add(key, source, write, extra=extra, tag=tag)

    def discard(self, key: str) -> None:
        """Take an entry away in one step, whole or not; nothing happens where there is none."""
        away = self.root / "tmp" / f"discarded-{os.getpid()}-{uuid.uuid4().hex}"
        away.parent.mkdir(parents=True, exist_ok=True)
        try:
            (self.root / "cache" / key).rename(away)
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
