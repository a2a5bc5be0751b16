"""The manifest: what was built into a cache, for whom, with what.

It lies beside the entries, in ``<cache_dir>/manifest.json``; the library never looks at it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from runner.build.compiler import release_of
from runner.cache.keys import CacheKeys, FirstKeys, Recipe, SecondKeys
from runner.errors import UserError
from runner.kernels.installed import Headers
from runner.kernels.table import union

_NAME = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """One kernel of the cache.

    Attributes:
        name: the library's kernel name.
        uses: GEMMs that run it, as :func:`runner.planning.plan.use_to_json` writes them.
        source_sha256: digest of ``kernel.cu``.
        cubin_sha256: digest of ``kernel.cubin``.
        cubin_bytes: size of ``kernel.cubin``.
    """

    name: str
    uses: list[dict[str, Any]]
    source_sha256: str
    cubin_sha256: str
    cubin_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a cache holds.

    Attributes:
        library: name and version of the library whose kernels these are.
        arch: architecture.
        signature: what the keys hold of the running machine's compiler.
        flags: what they hold of its flags, with the running machine's include path if any.
        built_with: signature of the compiler that built them.
        generation: of the JIT whose entries they are.
        extra_signature: see :class:`runner.cache.keys.Recipe`.
        gpu: name of the GPU, of several the one with the most SMs; empty in manifests that are
            older than this field.
        num_sms: its SMs; 0 in such manifests.
        plans: titles of the plans that were built.
        entries: kernels by cache key.
    """

    library: str
    arch: str
    signature: str
    flags: str
    built_with: str
    generation: int = 1
    extra_signature: str = ""
    gpu: str = ""
    num_sms: int = 0
    plans: list[str] = field(default_factory=list)
    entries: Mapping[str, Entry] = field(default_factory=dict)

    def same_target(self, other: Manifest) -> bool:
        """Whether both are for machines that look for the same keys."""
        return self._target == other._target

    @property
    def _target(self) -> tuple[str, ...]:
        return (
            self.library,
            self.arch,
            self.signature,
            self.flags,
            self.extra_signature,
        )

    def keys(self, headers: Headers) -> CacheKeys:
        """Keys as the manifest's machine makes them, from a library's headers."""
        recipe = Recipe(self.generation, tuple(self.flags.split(" ")), self.extra_signature)
        if self.generation == 1:
            return FirstKeys(headers, recipe, self.signature, Path())
        return SecondKeys(headers, recipe, self.signature)

    def merged(self, newer: Manifest) -> Manifest:
        """Both manifests' entries and plans; where both have an entry, the newer one's."""
        plans = list(dict.fromkeys([*self.plans, *newer.plans]))
        entries = dict(self.entries)
        for key, entry in newer.entries.items():
            uses = entries[key].uses if key in entries else []
            entries[key] = replace(entry, uses=_merged_uses([*uses, *entry.uses]))
        # What a newer compiler built must not pass for an older one's.
        built_with = max(self.built_with, newer.built_with, key=release_of)
        largest = max(newer, self, key=lambda manifest: manifest.num_sms)
        return replace(
            newer,
            plans=plans,
            entries=entries,
            built_with=built_with,
            gpu=largest.gpu,
            num_sms=largest.num_sms,
        )

    @property
    def sm_counts(self) -> set[int]:
        """Numbers of SMs that kernels were built for."""
        uses = (use for entry in self.entries.values() for use in entry.uses)
        return {self.num_sms, *(use["num_sms"] for use in uses if "num_sms" in use)} - {0}

    def without(self, keys: set[str]) -> Manifest:
        """The manifest less some entries."""
        kept = {key: entry for key, entry in self.entries.items() if key not in keys}
        return replace(self, entries=kept)


def _merged_uses(uses: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One use a GEMM, with every M and every stage."""
    found: dict[str, dict[str, Any]] = {}
    for use in uses:
        what = {name: use[name] for name in use if name not in ("m_ranges", "stages")}
        same = found.setdefault(json.dumps(what, sort_keys=True), {**use, "m_ranges": []})
        pairs = [tuple(pair) for pair in [*same["m_ranges"], *use["m_ranges"]]]
        same["m_ranges"] = [list(pair) for pair in union([tuple(pairs)])]
        stages = {*same.get("stages", ()), *use.get("stages", ())}
        same["stages"] = sorted(stages)
    return list(found.values())


def describe_entry(folder: Path, name: str, uses: list[dict[str, Any]]) -> Entry:
    """The manifest's line for an entry on disk."""
    source, cubin = (folder / "kernel.cu").read_bytes(), (folder / "kernel.cubin").read_bytes()
    return Entry(name, uses, sha256(source), sha256(cubin), len(cubin))


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def read_manifest(cache_dir: Path) -> Manifest | None:
    """The manifest of a cache, None where it has none.

    Raises:
        UserError: a file that is no manifest.
    """
    path = cache_dir / _NAME
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def parse_manifest(text: bytes, where: str) -> Manifest:
    """A manifest from its JSON; ``where`` names it in the error.

    Raises:
        UserError: not a manifest.
    """
    try:
        data = json.loads(text)
        entries = {key: Entry(**entry) for key, entry in data.pop("entries").items()}
        if data.pop("version") != 1:
            raise ValueError("unknown version")
        manifest = Manifest(**data, entries=entries)
        _check_types(manifest)
        return manifest
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where} is not a manifest: {error!r}") from None


def _check_types(manifest: Manifest) -> None:
    """Raise TypeError where a field is of another type than it says."""
    words = [*manifest._target, manifest.built_with, *manifest.plans]
    words.append(manifest.gpu)
    if not isinstance(manifest.num_sms, int):
        raise TypeError("num_sms must be a number")
    if manifest.generation not in (1, 2):
        raise ValueError(f"generation {manifest.generation!r} must be 1 or 2")
    for entry in manifest.entries.values():
        words += [entry.name, entry.source_sha256, entry.cubin_sha256]
        if not isinstance(entry.cubin_bytes, int):
            raise TypeError("cubin_bytes must be a number")
        check_uses(entry.uses)
    if not all(isinstance(word, str) for word in words):
        raise TypeError("text expected")


def check_uses(uses: object) -> None:
    """Raise TypeError or KeyError where ``uses`` is not what ``use_to_json`` writes."""
    if not isinstance(uses, list):
        raise TypeError("uses must be a list")
    for use in uses:
        numbers = [use[name] for name in ("n", "k", "num_groups")]
        numbers += [m for first, last in use["m_ranges"] for m in (first, last)]
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError("whole numbers expected")
        if not isinstance(use["type"], str) or not use["m_ranges"]:
            raise TypeError("a use needs a type and ranges")


def manifest_text(manifest: Manifest) -> str:
    """Canonical JSON: equal manifests give equal text."""
    data = {"version": 1, **asdict(manifest)}
    data["entries"] = {key: asdict(manifest.entries[key]) for key in sorted(manifest.entries)}
    return json.dumps(data, indent=1) + "\n"


def write_manifest(cache_dir: Path, manifest: Manifest) -> None:
    """Replace the manifest; readers see the old one or the new one."""
    temporary = cache_dir / f".{_NAME}.{os.getpid()}"
    try:
        with temporary.open("w") as file:
            file.write(manifest_text(manifest))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(cache_dir / _NAME)
    finally:
        temporary.unlink(missing_ok=True)


def check_target(cache_dir: Path, newer: Manifest) -> None:
    """Refuse to mix kernels of two machines in one cache.

    Raises:
        UserError: the cache was built for another machine.
    """
    older = read_manifest(cache_dir)
    if older is not None and older.entries and not older.same_target(newer):
        raise UserError(
            f"{cache_dir} was built for another machine ({older.library}, {older.arch}, "
            "or another compiler, flags or path): use another directory"
        )


def merge_manifest(cache_dir: Path, newer: Manifest) -> Manifest:
    """Add to a cache's manifest; the caller holds the lock.

    Raises:
        UserError: the cache was built for another machine.
    """
    check_target(cache_dir, newer)
    older = read_manifest(cache_dir)
    merged = older.merged(newer) if older is not None and older.entries else newer
    write_manifest(cache_dir, merged)
    return merged


@contextmanager
def locked(cache_dir: Path, *, wait: bool = True, shared: bool = False) -> Iterator[bool]:
    """Hold the cache's lock among builders; gives False where ``wait`` is off and it is taken.

    ``shared`` holders, each with a share of its own to build, do not exclude each other.
    The lock goes with its holder, however that ends. The library itself does not take it.

    Raises:
        UserError: the directory cannot be written.
    """
    try:
        file = (cache_dir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot lock {cache_dir}: {error.strerror}") from None
    with file:
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(file, kind | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
