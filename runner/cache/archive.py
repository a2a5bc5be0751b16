"""One reproducible archive of a cache: equal caches give equal bytes."""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from runner.cache.entry import CUBIN, SOURCE, format_of
from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import (
    Entry,
    Manifest,
    check_target,
    describe_entry,
    manifest_text,
    parse_manifest,
    read_manifest,
    sha256,
)
from runner.errors import UserError

_MEMBER = re.compile(r"cache/([\w.]+)/([\w.]+)")
_LARGEST_FILE = 256 << 20


def pack(cache: KernelCache, manifest: Manifest, archive: Path) -> int:
    """Write the manifest and its entries to ``archive`` (tar.gz); returns its size in bytes.

    Names are sorted; times, owners and modes are constants; the file appears whole.

    Raises:
        UserError: an entry of the manifest is missing or not what was built, or the archive cannot
            be written.
    """
    _check_complete(cache, manifest)
    temporary = archive.with_name(f".{archive.name}.{os.getpid()}")
    try:
        try:
            with (
                temporary.open("wb") as raw,
                gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
                tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
            ):
                for name, data in _members(cache, manifest):
                    tar.addfile(_info(name, len(data)), io.BytesIO(data))
            temporary.rename(archive)
        finally:
            temporary.unlink(missing_ok=True)
        return archive.stat().st_size
    except OSError as error:
        raise UserError(f"cannot write {archive}: {error.strerror}") from None


def _check_complete(cache: KernelCache, manifest: Manifest) -> None:
    missing = [key for key in manifest.entries if not cache.has(key)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(manifest.entries)} kernels of the manifest are missing in "
            f"{cache.root}, {missing[0]} among them: build them first (runner compile)"
        )
    for key, entry in manifest.entries.items():
        now = describe_entry(cache.entry(key), entry.name, entry.uses)
        if now != entry:
            raise UserError(
                f"{cache.entry(key)} is not what was built: runner cache verify {cache.root}"
            )


def _members(cache: KernelCache, manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    yield "manifest.json", manifest_text(manifest).encode()
    for key in sorted(manifest.entries):
        for file in _files(key):
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
    """Place the archive's entries in a cache.

    An entry that is there stays where it is the archive's or what the cache's own manifest names;
    one that is neither is replaced.

    Returns:
        The manifest of the archive's entries as they now are in the cache, and how many of them
        were placed.

    Raises:
        UserError: not such an archive, an entry that differs from the archive's manifest, or a
            cache of another machine. Entries placed before the error stay, each of them whole.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            return _unpack(tar, archive, cache, progress)
    except (OSError, tarfile.TarError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {archive}: {error}") from None


def _unpack(
    tar: tarfile.TarFile, archive: Path, cache: KernelCache, progress: Callable[[int, int], None]
) -> tuple[Manifest, int]:
    first = tar.next()
    if first is None or first.name != "manifest.json":
        raise UserError(f"{archive} is not a packed cache: manifest.json must come first")
    manifest = parse_manifest(_read(tar, first, archive), f"manifest.json of {archive}")
    check_target(cache.root, manifest)
    known = read_manifest(cache.root)
    placed = 0
    seen: set[str] = set()
    for key, files in _entries(tar, archive, manifest):
        seen.add(key)
        if not _stays(cache, key, manifest.entries[key], known):
            cache.discard(key)
            source, cubin = files.pop(SOURCE).decode(), files.pop(CUBIN)
            placed += cache.put(key, source, cubin, extra=files)
        progress(len(seen), len(manifest.entries))
    lacking = len(manifest.entries) - len(seen)
    if lacking:
        raise UserError(f"{archive} lacks {lacking} kernels that its manifest names")
    entries = {
        key: describe_entry(cache.entry(key), entry.name, entry.uses)
        for key, entry in manifest.entries.items()
    }
    return replace(manifest, entries=entries), placed


def _stays(cache: KernelCache, key: str, packed: Entry, known: Manifest | None) -> bool:
    """Whether an entry is there already: the archive's, or another build of the cache's own."""
    if not cache.entry(key).is_dir():
        return False
    try:
        there = describe_entry(cache.entry(key), packed.name, packed.uses)
    except OSError:
        return False
    trusted = [packed] + ([known.entries[key]] if known and key in known.entries else [])
    return any(
        (there.source_sha256, there.cubin_sha256) == (entry.source_sha256, entry.cubin_sha256)
        for entry in trusted
    )


def _entries(
    tar: tarfile.TarFile, archive: Path, manifest: Manifest
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Each key with its entry's files, which follow each other."""
    while member := tar.next():
        key = _key_of(member, archive, manifest)
        files: dict[str, bytes] = {}
        for file in _files(key):
            if member is None or member.name != f"cache/{key}/{file}":
                there = "nothing" if member is None else member.name
                raise UserError(f"{archive}: {there} where {file} of {key} was expected")
            files[file] = _read(tar, member, archive)
            member = tar.next() if len(files) < len(_files(key)) else member
        _check_digests(archive, key, files, manifest.entries[key])
        yield key, files


def _files(key: str) -> tuple[str, ...]:
    """The files of an entry; none where the name is no entry's."""
    form = format_of(key)
    return form.files if form else ()


def _key_of(member: tarfile.TarInfo, archive: Path, manifest: Manifest) -> str:
    match = _MEMBER.fullmatch(member.name)
    if not match or match[1] not in manifest.entries or not _files(match[1]):
        raise UserError(f"{archive} holds {member.name}, which its manifest does not name")
    return match[1]


def _check_digests(archive: Path, key: str, files: dict[str, bytes], entry: Entry) -> None:
    for file, digest in ((SOURCE, entry.source_sha256), (CUBIN, entry.cubin_sha256)):
        if sha256(files[file]) != digest:
            raise UserError(f"{archive}: cache/{key}/{file} is not what its manifest names")


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, archive: Path) -> bytes:
    if member.size > _LARGEST_FILE:
        raise UserError(f"{archive}: {member.name} is larger than {_LARGEST_FILE >> 20} MiB")
    file = tar.extractfile(member) if member.isreg() else None
    if file is None:
        raise UserError(f"{archive}: {member.name} is not a plain file")
    return file.read()
