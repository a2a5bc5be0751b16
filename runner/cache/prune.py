"""Take entries out of a cache, each in one step."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from runner.cache.entry import format_of
from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import read_manifest, write_manifest


def superfluous(cache: KernelCache, wanted: Collection[str]) -> list[Path]:
    """Kernels' folders that ``wanted`` does not name; anything else there is left alone."""
    return [
        path
        for path in cache.entries()
        if path.name not in wanted and format_of(path.name) and path.is_dir()
    ]


def prune(cache: KernelCache, entries: Collection[Path]) -> int:
    """Remove entries; returns the bytes that they held. The caller holds the lock.

    The manifest forgets them first; then each goes in one step, so that no process ever finds
    half an entry.
    """
    manifest = read_manifest(cache.root)
    if manifest is not None:
        write_manifest(cache.root, manifest.without({path.name for path in entries}))
    freed = 0
    for path in entries:
        freed += size_of(path)
        cache.discard(path.name)
    return freed


def size_of(path: Path) -> int:
    """Bytes of an entry's files."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
