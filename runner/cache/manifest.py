"""The manifest of a cache: what was built, for which machine, and with which tools.

It is ``<cache_dir>/manifest.json``, next to the entries; the library never looks at it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from runner.cache.kernel_cache import KernelCache, size_of
from runner.errors import UserError
from runner.files import parse_json, replacing
from runner.kernels.call_template import CallShape
from runner.kernels.entry import CUBIN, SOURCE
from runner.kernels.installed import Headers
from runner.kernels.keys import INCLUDE, CacheKeys, Recipe
from runner.kernels.nvcc import release_of
from runner.kernels.table import union

_NAME = "manifest.json"
_INCLUDE_FLAG = re.compile(r"(?<!\S)-I(.*?/include)(?= -|$)")

Use = dict[str, Any]
"""A GEMM that runs a kernel, as :func:`runner.planning.plan.use_to_json` writes it."""


@dataclass(frozen=True)
class Entry:
    """One kernel of the cache; ``name`` is the library's name for it."""

    name: str
    uses: list[Use]
    source_sha256: str
    cubin_sha256: str
    cubin_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a cache holds, and which machine it is for.

    Attributes:
        library: name and version of the library that the kernels belong to.
        signature: the running machine's compiler, as the keys include it.
        flags: that compiler's flags, as the keys include them, with the include path if any.
        built_with: signature of the compiler that built them.
        gpu: name of the GPU, or of the one with the most SMs; empty in old manifests.
        num_sms: SM count of ``gpu``; 0 in old manifests.
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
        """Whether both are for machines with the same keys."""
        names = ("library", "arch", "signature", "flags", "extra_signature")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    @property
    def include_path(self) -> str:
        """The include path in the flags; empty if there is none."""
        match = _INCLUDE_FLAG.search(self.flags)
        return match[1] if match else ""

    @property
    def recipe(self) -> Recipe:
        """How the library compiles on the machine that the cache is for."""
        path = self.include_path  # may contain blanks
        flags = self.flags.replace(f"-I{path}", f"-I{INCLUDE}", 1) if path else self.flags
        return Recipe(self.generation, tuple(flags.split(" ")), self.extra_signature)

    def keys(self, headers: Headers) -> CacheKeys:
        """Cache keys of the manifest's machine, from a library's headers."""
        return CacheKeys(headers, self.recipe, self.signature, Path(self.include_path))

    def merged(self, newer: Manifest) -> Manifest:
        """Combine both manifests' entries and plans; the newer one's entries win."""
        entries = dict(self.entries)
        for key, entry in newer.entries.items():
            uses = entries[key].uses if key in entries else []
            entries[key] = replace(entry, uses=_merged_uses([*uses, *entry.uses]))
        largest = max(newer, self, key=lambda manifest: manifest.num_sms)
        return replace(
            newer,
            plans=list(dict.fromkeys([*self.plans, *newer.plans])),
            entries=entries,
            # A newer compiler's entries must not pass for an older one's.
            built_with=max(self.built_with, newer.built_with, key=release_of),
            gpu=largest.gpu,
            num_sms=largest.num_sms,
        )

    @property
    def sm_counts(self) -> set[int]:
        """SM counts that kernels were built for."""
        uses = (use for entry in self.entries.values() for use in entry.uses)
        return {self.num_sms, *(use["num_sms"] for use in uses if "num_sms" in use)} - {0}

    @classmethod
    def of_keys(cls, keys: CacheKeys, library: str, **more: Any) -> Manifest:
        """A manifest for the machine of ``keys``, whose compiler also built the entries."""
        recipe, signature = keys.recipe, keys.signature
        return cls(
            library,
            recipe.arch,
            signature,
            keys.flags,
            generation=recipe.generation,
            extra_signature=recipe.extra_signature,
            **{"built_with": signature, **more},
        )

    def without(self, keys: Collection[str]) -> Manifest:
        kept = {key: entry for key, entry in self.entries.items() if key not in keys}
        return replace(self, entries=kept)


def _merged_uses(uses: list[Use]) -> list[Use]:
    """One use for each GEMM, with every M and every stage."""
    found: dict[str, Use] = {}
    for use in uses:
        gemm = {name: use[name] for name in use if name not in ("m_ranges", "stages")}
        same = found.setdefault(json.dumps(gemm, sort_keys=True), {**use, "m_ranges": []})
        pairs = tuple((first, last) for first, last in [*same["m_ranges"], *use["m_ranges"]])
        same["m_ranges"] = [list(pair) for pair in union([pairs])]
        same["stages"] = sorted({*same.get("stages", ()), *use.get("stages", ())})
    return list(found.values())


def describe_entry(folder: Path, name: str, uses: list[Use]) -> Entry:
    """Describe an entry on disk for the manifest."""
    source, cubin = (folder / SOURCE).read_bytes(), (folder / CUBIN).read_bytes()
    return Entry(name, uses, sha256(source), sha256(cubin), len(cubin))


def sha256(data: bytes) -> str:
    """Hex SHA-256 digest."""
    return hashlib.sha256(data).hexdigest()


def read_manifest(cache_dir: Path) -> Manifest | None:
    """Read the manifest of a cache; None if it has none.

    Raises:
        UserError: the file is unreadable or not a manifest.
    """
    path = cache_dir / _NAME
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Parse a manifest's JSON; ``where`` names it in the error.

    Raises:
        UserError: not a manifest.
    """
    try:
        data = parse_json(text)
        entries = {key: Entry(**entry) for key, entry in data.pop("entries").items()}
        if data.pop("version") != 1:
            raise ValueError("unknown version")
        manifest = Manifest(**data, entries=entries)
        _check_types(manifest)
        if not all(isinstance(plan, str) for plan in manifest.plans):
            raise TypeError("plans must be text")
        for entry in entries.values():
            _check_types(entry)
            check_uses(entry.uses)
        if manifest.generation not in (1, 2):
            raise ValueError(f"generation {manifest.generation} must be 1 or 2")
        return manifest
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where} is not a manifest: {error!r}") from None


def _check_types(value: Manifest | Entry) -> None:
    """Raise TypeError if a field has another type than its annotation."""
    types = {"str": str, "int": int, "list[str]": list}
    for each in fields(value):
        kind = types.get(str(each.type), object)
        if not isinstance(getattr(value, each.name), kind):
            raise TypeError(f"{each.name} must be of type {each.type}")


def check_uses(uses: object) -> None:
    """Raise TypeError, ValueError or KeyError if ``uses`` is not what ``use_to_json`` writes."""
    if not isinstance(uses, list):
        raise TypeError("uses must be a list")
    for use in uses:
        is_call = "call" in use
        sizes = ("num_sms", "m_step") if is_call else ("n", "k", "num_groups")
        numbers = [use[name] for name in sizes]
        numbers += [m for first, last in use["m_ranges"] for m in (first, last)]
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError("whole numbers expected")
        if not isinstance(use["call" if is_call else "type"], str) or not use["m_ranges"]:
            raise TypeError("a use needs a type and ranges")
        if is_call:
            CallShape(use["call"], use["num_sms"]).describe()
        if use.get("m_step", 1) < 1:
            raise ValueError("m_step must be at least 1")


def manifest_text(manifest: Manifest) -> str:
    """Canonical JSON: equal manifests give equal text."""
    data = {"version": 1, **asdict(manifest)}
    data["entries"] = {key: asdict(manifest.entries[key]) for key in sorted(manifest.entries)}
    return json.dumps(data, indent=1) + "\n"


def write_manifest(cache_dir: Path, manifest: Manifest) -> None:
    """Replace the manifest; readers see the old one or the new one."""
    with replacing(cache_dir / _NAME) as temporary, temporary.open("w") as file:
        file.write(manifest_text(manifest))
        file.flush()
        os.fsync(file.fileno())


def check_target(cache_dir: Path, newer: Manifest) -> None:
    """Raise UserError if the cache was built for another machine: a cache serves only one."""
    older = read_manifest(cache_dir)
    if older is not None and older.entries and not older.same_target(newer):
        raise UserError(
            f"{cache_dir} was built for another machine ({older.library}, {older.arch}, "
            "or another compiler, flags or path): use another directory"
        )


def merge_manifest(cache_dir: Path, newer: Manifest) -> Manifest:
    """Merge into the manifest of a cache for the same machine; the caller holds the lock."""
    check_target(cache_dir, newer)
    older = read_manifest(cache_dir)
    merged = older.merged(newer) if older is not None and older.entries else newer
    write_manifest(cache_dir, merged)
    return merged


def remove_entries(cache: KernelCache, entries: Collection[Path]) -> int:
    """Remove entries, first from the manifest; the caller holds the lock. Returns bytes freed."""
    manifest = read_manifest(cache.root)
    if manifest is not None:
        write_manifest(cache.root, manifest.without({path.name for path in entries}))
    freed = sum(map(size_of, entries))
    for path in entries:
        cache.discard(path.name)
    return freed
