"""One reproducible archive of a cache: equal caches give equal bytes."""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from runner.errors import UserError
from runner.jit.cache import KernelCache
from runner.jit.store.manifest import (
    Manifest,
    manifest_text,
    read_manifest,
    sha256,
    write_manifest,
)

_MEMBER = re.compile(r"cache/(kernel\.\w+\.[0-9a-f]{32})/(kernel\.cu|kernel\.cubin)")
_LARGEST_FILE = 256 << 20


def pack(cache: KernelCache, manifest: Manifest, archive: Path) -> int:
    """Write the manifest and its entries to ``archive`` (tar.gz); returns its size in bytes.

    Names are sorted; times, owners and modes are constants; the file appears whole.

    Raises:
        UserError: an entry of the manifest is missing, or the archive cannot be written.
    """
    missing = [key for key in manifest.entries if not cache.has(key)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(manifest.entries)} kernels of the manifest are missing in "
            f"{cache.root}, {missing[0]} among them: build them first (runner compile)"
        )
    temporary = archive.with_name(f".{archive.name}.{os.getpid()}")
    try:
        with (
            temporary.open("wb") as raw,
            gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for name, data in _members(cache, manifest):
                tar.addfile(_info(name, len(data)), io.BytesIO(data))
        temporary.rename(archive)
    except OSError as error:
        raise UserError(f"cannot write {archive}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return archive.stat().st_size


def _members(cache: KernelCache, manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    yield "manifest.json", manifest_text(manifest).encode()
    for key in sorted(manifest.entries):
        for file in ("kernel.cu", "kernel.cubin"):
            yield f"cache/{key}/{file}", (cache.entry(key) / file).read_bytes()


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info


def unpack(
    archive: Path,
    cache: KernelCache,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Manifest, int]:
    """Place the archive's entries in a cache; entries that are there stay as they are.

    Returns:
        The archive's manifest and how many entries were placed.

    Raises:
        UserError: not such an archive, or an entry that differs from the archive's manifest;
            entries placed before it stay, each of them whole.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            return _unpack(tar, archive, cache, progress)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"cannot read {archive}: {error}") from None


def _unpack(
    tar: tarfile.TarFile, archive: Path, cache: KernelCache, progress: Callable[[int, int], None]
) -> tuple[Manifest, int]:
    first = tar.next()
    if first is None or first.name != "manifest.json":
        raise UserError(f"{archive} is not a packed cache: manifest.json must come first")
    manifest = _manifest_of(_read(tar, first, archive), cache)
    sources: dict[str, str] = {}
    placed = number = 0
    while member := tar.next():
        match = _MEMBER.fullmatch(member.name)
        if not match or match[1] not in manifest.entries:
            raise UserError(f"{archive} holds {member.name}, which its manifest does not name")
        key, file = match[1], match[2]
        data = _read(tar, member, archive)
        entry = manifest.entries[key]
        digest = entry.source_sha256 if file == "kernel.cu" else entry.cubin_sha256
        if sha256(data) != digest:
            raise UserError(f"{archive}: {member.name} is not what its manifest names")
        if file == "kernel.cu":
            sources[key] = data.decode()
            continue
        number += 1
        if not cache.has(key):
            placed += cache.add(key, sources[key], _writer(data))
        progress(number, len(manifest.entries))
    lacking = [key for key in manifest.entries if not cache.has(key)]
    if lacking:
        raise UserError(f"{archive} lacks {len(lacking)} kernels that its manifest names")
    return manifest, placed


def _manifest_of(data: bytes, cache: KernelCache) -> Manifest:
    """Read a manifest out of an archive by way of a folder of its own."""
    folder = cache.root / "tmp" / f"manifest-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        (folder / "manifest.json").write_bytes(data)
        manifest = read_manifest(folder)
        assert manifest is not None
        return manifest
    finally:
        (folder / "manifest.json").unlink(missing_ok=True)
        folder.rmdir()


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, archive: Path) -> bytes:
    file = tar.extractfile(member) if member.isreg() and member.size <= _LARGEST_FILE else None
    if file is None:
        raise UserError(f"{archive}: {member.name} is not a plain file")
    return file.read()


def _writer(data: bytes) -> Callable[[Path, Path, Path], None]:
    def write(source: Path, target: Path, work_dir: Path) -> None:
        target.write_bytes(data)

    return write


def merge_manifest(cache_dir: Path, newer: Manifest) -> Manifest:
    """Add to a cache's manifest; the caller holds the lock.

    Raises:
        UserError: the cache was built for another machine.
    """
    older = read_manifest(cache_dir)
    merged = newer
    if older is not None and older.entries:
        if not older.same_target(newer):
            raise UserError(
                f"{cache_dir} was built for another machine ({older.signature}, "
                f"{older.library}, other flags or path): use another directory"
            )
        merged = older.merged(newer)
    write_manifest(cache_dir, merged)
    return merged
