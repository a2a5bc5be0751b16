"""Is a cache what it should be: every problem, entry by entry."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from runner.build.cubin import NotACubinError, kernels_in
from runner.cache.entry import SOURCE, EntryFormat, format_of, kernel_name
from runner.cache.kernel_cache import KernelCache
from runner.cache.keys import CacheKeys
from runner.cache.manifest import Manifest, sha256
from runner.kernels.installed import Library, include_hash
from runner.kernels.kernel import HASH_LINE


class Problem(Enum):
    """What can be wrong with a cache."""

    MISSING = "missing"
    FOREIGN = "foreign"
    TRUNCATED = "truncated"
    CHANGED = "changed"
    WRONG_KEY = "wrong key"
    WRONG_VERSION = "wrong version"


@dataclass(frozen=True)
class Finding:
    """One problem; ``key`` names the entry, ``words`` say what is wrong."""

    problem: Problem
    key: str
    words: str


@dataclass(frozen=True)
class Expectation:
    """What a cache is held against.

    Attributes:
        wanted: keys that must be there.
        known: keys that may be there, or None where any may.
        keys: of the machine that will run; None leaves keys unchecked.
        library: headers that sources must name; None leaves them unchecked.
        manifest: digests; None leaves contents unchecked but for being whole.
    """

    wanted: Collection[str]
    known: Collection[str] | None
    keys: CacheKeys | None
    library: Library | None
    manifest: Manifest | None


def verify(cache: KernelCache, expected: Expectation) -> list[Finding]:
    """Every problem of the cache, missing entries first."""
    present = {path.name: path for path in cache.entries()}
    findings = [
        Finding(Problem.MISSING, key, "is not in the cache")
        for key in expected.wanted
        if key not in present
    ]
    for name in sorted(present):
        findings += _entry_problems(present[name], expected)
    return findings


def _entry_problems(path: Path, expected: Expectation) -> Iterator[Finding]:
    form = format_of(path.name)
    if form is None or not path.is_dir():
        yield Finding(Problem.FOREIGN, path.name, "is not a kernel's folder")
        return
    if expected.known is not None and path.name not in expected.known:
        yield Finding(Problem.FOREIGN, path.name, "is not in the manifest or the plan")
    whole = _incomplete(path, form)
    if whole:
        yield Finding(Problem.TRUNCATED, path.name, whole)
        return
    source = (path / SOURCE).read_bytes().decode(errors="replace")
    yield from _identity_problems(path.name, source, expected)
    if expected.manifest is not None and path.name in expected.manifest.entries:
        entry = expected.manifest.entries[path.name]
        for file, digest in (
            ("kernel.cu", entry.source_sha256),
            ("kernel.cubin", entry.cubin_sha256),
        ):
            if sha256((path / file).read_bytes()) != digest:
                yield Finding(Problem.CHANGED, path.name, f"{file} is not what was built")


def _incomplete(path: Path, form: EntryFormat) -> str:
    """What an entry lacks to be whole; empty where it is."""
    for name in form.files:
        if not (path / name).is_file():
            return f"{name} is missing: {form.on_damage}"
    try:
        count = len(kernels_in((path / "kernel.cubin").read_bytes()))
    except NotACubinError as error:
        return f"kernel.cubin is {error}"
    return "" if count == 1 else f"kernel.cubin holds {count} kernels instead of one"


def _identity_problems(key: str, source: str, expected: Expectation) -> Iterator[Finding]:
    library, name = expected.library, kernel_name(key)
    line = HASH_LINE.match(source)
    body = source[line.end() :] if line else source
    if expected.keys is not None and key != _key_of(expected.keys, name, source):
        yield Finding(Problem.WRONG_KEY, key, "is not this source's key for this machine")
    form = format_of(key)
    if library is None or form is None or form.generation == 2:  # there the key holds the headers
        return
    if not line or line[1] != _include_hash(library, body):
        yield Finding(Problem.WRONG_VERSION, key, "was generated from headers of another version")


def _key_of(keys: CacheKeys, name: str, source: str) -> str:
    """The key; empty where the source names a header that the library lacks."""
    try:
        return keys.key_of(name, source)
    except OSError:
        return ""


def _include_hash(library: Library, body: str) -> str:
    """Digest over the headers that a source names; empty where the library lacks one."""
    try:
        return include_hash(library, body)
    except OSError:
        return ""
