"""Pack a cache into one reproducible archive: equal caches give equal bytes.

A tar.gz of ``manifest.json``, then ``cache/<key>/<file>`` for each of the manifest's keys in order.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

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
from runner.files import replacing
from runner.kernels.entry import CUBIN, SOURCE, files_of

_LARGEST_FILE = 256 << 20


def pack(cache: KernelCache, manifest: Manifest, archive: Path) -> int:
    """Write the manifest and its entries to ``archive`` in one step; returns the archive's size.

    Raises:
        UserError: an entry of the manifest is missing or changed, or the archive is not writable.
    """
    _check_complete(cache, manifest)
    try:
        with (
            replacing(archive) as temporary,
            temporary.open("wb") as raw,
            gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            _add(tar, "manifest.json", manifest_text(manifest).encode())
            for key in sorted(manifest.entries):
                for file in files_of(key):
                    _add(tar, f"cache/{key}/{file}", (cache.entry(key) / file).read_bytes())
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
        if describe_entry(cache.entry(key), entry.name, entry.uses) != entry:
            raise UserError(
                f"{cache.entry(key)} is not what was built: run runner cache verify {cache.root}"
            )


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    tar.addfile(info, io.BytesIO(data))


def check_archive(archive: Path) -> None:
    """Raise UserError if ``archive`` does not begin as :func:`pack` writes it."""
    with _opened(archive) as tar:
        _read_manifest(tar, archive)


def unpack(
    archive: Path,
    cache: KernelCache,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Manifest, int]:
    """Place the archive's entries in a cache; the caller holds the cache's lock.

    An existing entry stays if it matches the cache's own manifest or, if that does not name it,
    the archive's manifest; otherwise it is replaced.

    Returns:
        The manifest of the archive's entries as they now are in the cache, and how many were
        placed.

    Raises:
        UserError: not a packed cache, an entry that differs from the archive's manifest, or a
            cache for another machine. Entries placed before the error stay, each of them whole.
    """
    placed, entries = 0, {}
    with _opened(archive) as tar:
        manifest = _read_manifest(tar, archive)
        check_target(cache.root, manifest)
        before = read_manifest(cache.root)
        known = before.entries if before else {}
        for key in sorted(manifest.entries):
            entry = manifest.entries[key]
            files = _read_entry(tar, key, entry, archive)
            source, cubin = files.pop(SOURCE).decode(), files.pop(CUBIN)
            digest = known.get(key, entry).cubin_sha256
            if cache.keys_to_build({key: source}, {key: digest}):
                placed += cache.put(key, source, cubin, files)
            entries[key] = describe_entry(cache.entry(key), entry.name, entry.uses)
            progress(len(entries), len(manifest.entries))
        if (more := tar.next()) is not None:
            raise UserError(f"{archive} holds {more.name}, which its manifest does not name")
    return replace(manifest, entries=entries), placed


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(archive, "r:gz") as tar:
            yield tar
    except (OSError, tarfile.TarError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {archive}: {error}") from None


def _read_manifest(tar: tarfile.TarFile, archive: Path) -> Manifest:
    text = _read(tar, "manifest.json", archive)
    return parse_manifest(text, f"manifest.json of {archive}")


def _read_entry(tar: tarfile.TarFile, key: str, entry: Entry, archive: Path) -> dict[str, bytes]:
    """Read an entry's files and check their digests against the manifest."""
    if not files_of(key):  # Otherwise the key could be a path that leads out of the cache.
        raise UserError(f"{archive}: its manifest names {key!r}, which is not a kernel's key")
    files = {file: _read(tar, f"cache/{key}/{file}", archive) for file in files_of(key)}
    for file, digest in ((SOURCE, entry.source_sha256), (CUBIN, entry.cubin_sha256)):
        if sha256(files[file]) != digest:
            raise UserError(f"{archive}: cache/{key}/{file} does not match its manifest")
    return files


def _read(tar: tarfile.TarFile, name: str, archive: Path) -> bytes:
    """Read the archive's next member, which must be a plain file of this name."""
    member = tar.next()
    if member is None or member.name != name:
        found = "nothing" if member is None else member.name
        raise UserError(f"{archive} is not a packed cache: {found} where {name} was expected")
    if member.size > _LARGEST_FILE:
        raise UserError(f"{archive}: {name} is larger than {_LARGEST_FILE >> 20} MiB")
    file = tar.extractfile(member) if member.isreg() else None
    if file is None:
        raise UserError(f"{archive}: {name} is not a plain file")
    return file.read()
