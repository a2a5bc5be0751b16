"""Verify a cache: list every problem, entry by entry."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import Manifest, sha256
from runner.kernels.entry import CUBIN, SOURCE, cubin_damage, format_of, kernel_name, missing_files
from runner.kernels.installed import Library, include_hash
from runner.kernels.kernel import HASH_LINE
from runner.kernels.keys import CacheKeys


@dataclass(frozen=True)
class Finding:
    """A problem with the entry of ``key``: its kind, and a description in ``words``."""

    problem: str
    key: str
    words: str


@dataclass(frozen=True)
class Expectation:
    """What to compare a cache with.

    Attributes:
        wanted: keys that must be present.
        known: keys that may be present; None allows any.
        keys: cache keys of the machine that will run; None leaves keys unchecked.
        library: library whose headers the sources must name; None leaves them unchecked.
        manifest: digests of the files; without one, entries only have to be whole.
    """

    wanted: Collection[str]
    known: Collection[str] | None
    keys: CacheKeys | None
    library: Library | None
    manifest: Manifest | None


def verify(cache: KernelCache, expected: Expectation) -> list[Finding]:
    """List every problem of the cache, missing entries first."""
    present = {path.name: path for path in cache.entries()}
    findings = [
        Finding("missing", key, "is not in the cache")
        for key in expected.wanted
        if key not in present
    ]
    for key, path in present.items():
        findings += (Finding(problem, key, words) for problem, words in _problems(path, expected))
    return findings


def _problems(path: Path, expected: Expectation) -> Iterator[tuple[str, str]]:
    key = path.name
    form = format_of(key)
    if form is None or not path.is_dir():
        yield "foreign", "is not a kernel's folder"
        return
    if expected.known is not None and key not in expected.known:
        yield "foreign", "is not in the manifest or the plan"
    if missing := missing_files(path):
        yield "truncated", f"{missing[0]} is missing: {form.on_damage}"
        return
    source, cubin = (path / SOURCE).read_bytes(), (path / CUBIN).read_bytes()
    if damage := cubin_damage(cubin):
        yield "truncated", f"{CUBIN} {damage}"
        return
    text = source.decode(errors="replace")
    if expected.keys is not None and key != _key(expected.keys, kernel_name(key), text):
        yield "wrong key", "is not this source's key for this machine"
    # In the second generation the key itself digests the headers.
    if (
        form.generation == 1
        and expected.library is not None
        and not _names_headers_of(expected.library, text)
    ):
        yield "wrong version", "was generated from headers of another version"
    if expected.manifest is not None and (entry := expected.manifest.entries.get(key)):
        if sha256(source) != entry.source_sha256:
            yield "changed", f"{SOURCE} is not what was built"
        if sha256(cubin) != entry.cubin_sha256:
            yield "changed", f"{CUBIN} is not what was built"


def _key(keys: CacheKeys, name: str, source: str) -> str:
    """The source's key; empty if the source names a header that the library lacks."""
    try:
        return keys.key_of(name, source)
    except OSError:
        return ""


def _names_headers_of(library: Library, source: str) -> bool:
    """Whether a source's first line has the digest of the library's headers."""
    line = HASH_LINE.match(source)
    try:
        return line is not None and line[1] == include_hash(library, source[line.end() :])
    except OSError:
        return False
