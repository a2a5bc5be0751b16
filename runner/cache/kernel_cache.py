"""The disk cache in DeepGEMM's own layout, so that the library hits what we build."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runner.cache.lock import folder_lock
from runner.errors import UserError
from runner.kernels.entry import CUBIN, SOURCE, cubin_damage, format_of, missing_files


@dataclass(frozen=True)
class KernelCache:
    """A cache (``DG_JIT_CACHE_DIR``), whose entries are the folders in ``<root>/cache``.

    Attributes:
        root: the directory that is written to.
        below: further directories that are only read; the second generation accepts
            ``DG_JIT_CACHE_DIR=writable:readonly:...``.
    """

    root: Path
    below: tuple[Path, ...] = ()

    @classmethod
    def of_text(cls, text: str) -> KernelCache:
        """The cache that a value of ``DG_JIT_CACHE_DIR`` names.

        Raises:
            UserError: a part of the text is empty.
        """
        parts = text.split(":")
        if not all(parts):
            raise UserError(
                f"cache directory {text!r} has an empty part: it must be DIR, or "
                "WRITABLE:READONLY:..."
            )
        root, *below = map(Path, parts)
        return cls(root, tuple(below))

    @classmethod
    def existing(cls, directory: Path) -> KernelCache:
        """Open the cache in a directory.

        Raises:
            UserError: there is none.
        """
        found = cls.of_text(str(directory))
        if not (found.root / "cache").is_dir():
            raise UserError(f"{directory} is not a kernel cache: it has no folder named cache")
        return found

    @classmethod
    def writable(cls, directory: Path) -> KernelCache:
        """The cache in a directory that is to be written.

        Raises:
            UserError: several directories are named.
        """
        cache = cls.of_text(str(directory))
        if cache.below:
            raise UserError(f"{directory} is a list of directories: give the one to write to")
        return cache

    def check_generation(self, generation: int) -> None:
        """Raise UserError if this is a list of directories and the JIT reads only one."""
        if self.below and generation == 1:
            raise UserError(
                f"cache directory {self.text!r} is a list, which needs sgl-deep-gemm >= 0.2.0: "
                "give one directory"
            )

    @property
    def text(self) -> str:
        """The value of ``DG_JIT_CACHE_DIR`` that names this cache from any working directory."""
        return ":".join(str(path.absolute()) for path in (self.root, *self.below))

    def prepare(self) -> None:
        """Create the directory.

        Raises:
            UserError: it cannot be created or written.
        """
        probe = self._temporary("probe-")
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
        """Every entry, whole or broken, ordered by name."""
        found: dict[str, Path] = {}
        for root in (self.root, *self.below):
            folder = root / "cache"
            for path in folder.iterdir() if folder.is_dir() else ():
                found.setdefault(path.name, path)
        return [found[name] for name in sorted(found)]

    def entry(self, key: str) -> Path:
        """The directory of a kernel's entry, or where it would be written if there is none."""
        places = [root / "cache" / key for root in (self.root, *self.below)]
        return next((place for place in places if place.exists()), places[0])

    def has(self, key: str) -> bool:
        """Whether the cache has the kernel.

        Raises:
            UserError: the directory exists but is not whole; the library would abort on it.
        """
        entry = self.entry(key)
        if not entry.exists():
            return False
        if missing := missing_files(entry):
            raise UserError(
                f"corrupted cache entry {entry}: {' and '.join(missing)} missing; remove it"
            )
        return True

    def holds(self, key: str, source: str, cubin_sha256: str = "") -> bool:
        """Whether the entry exists and is whole, with this source and, if given, this cubin."""
        entry = self.entry(key)
        if format_of(key) is None or missing_files(entry):
            return False
        try:
            same = (entry / SOURCE).read_bytes() == source.encode()
            cubin = (entry / CUBIN).read_bytes()
        except OSError:  # Another process has just discarded it.
            return False
        digest = cubin_sha256 and hashlib.sha256(cubin).hexdigest()
        return same and digest == cubin_sha256 and not cubin_damage(cubin)

    def keys_to_build(
        self, sources: Mapping[str, str], cubin_sha256: Mapping[str, str] | None = None
    ) -> list[str]:
        """Discard broken entries, and return the keys that have no entry.

        Several processes may call this at once. An entry that another process has completed in the
        meantime stays, because an entry must still be broken under a lock to be discarded. Without
        a digest, a cubin only has to be whole.
        """
        missing = []
        for key, source in sources.items():
            wanted = (key, source, (cubin_sha256 or {}).get(key, ""))
            if self.holds(*wanted):
                continue
            if (self.root / "cache" / key).exists():
                with folder_lock(self.root / "cache", self.root):
                    if self.holds(*wanted):
                        continue
                    self.discard(key)
            missing.append(key)
        return missing

    def put(
        self,
        key: str,
        source: str,
        cubin: bytes,
        extra: Mapping[str, bytes] | None = None,
        *,
        prefix: str = "build-",
    ) -> bool:
        """Write an entry to a temporary directory and move it into place.

        Returns False if another process was first; that entry stays. :meth:`remove_leftovers`
        removes temporary directories with the default ``prefix``.
        """
        temporary = self._temporary(prefix)
        temporary.mkdir(parents=True)
        try:
            for name, data in {SOURCE: source.encode(), CUBIN: cubin, **(extra or {})}.items():
                (temporary / name).write_bytes(data)
                _fsync(temporary / name)
            _fsync(temporary)
            final = self.root / "cache" / key
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.rename(final)
            except OSError:
                if final.is_dir():
                    return False
                raise
            return True
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def discard(self, key: str) -> None:
        """Remove an entry, whole or broken, in one step; do nothing if there is none."""
        away = self._temporary("discarded-")
        away.parent.mkdir(parents=True, exist_ok=True)
        try:
            (self.root / "cache" / key).rename(away)
        except FileNotFoundError:
            return
        if away.is_dir() and not away.is_symlink():
            shutil.rmtree(away, ignore_errors=True)
        else:
            away.unlink()

    def remove_leftovers(self) -> None:
        """Remove temporary folders that killed processes left; no other builder may be running."""
        for prefix in ("build-", "discarded-"):
            for path in (self.root / "tmp").glob(f"{prefix}*"):
                shutil.rmtree(path, ignore_errors=True)

    def _temporary(self, prefix: str) -> Path:
        return self.root / "tmp" / f"{prefix}{os.getpid()}-{uuid.uuid4().hex}"


def size_of(entry: Path) -> int:
    """Total size of an entry's files in bytes."""
    return sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
