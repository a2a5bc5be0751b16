"""Recorded tables: what a library once said, as a file."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.cache.keys import Recipe
from runner.errors import UserError
from runner.kernels.heuristics_sm90 import CONTIGUOUS_M_ALIGNMENT
from runner.kernels.kernel import Kernel
from runner.kernels.table import Kernels, Origin, RecordedTable, Run, Source, join_runs
from runner.kernels.types import CONTIGUOUS_TYPES, GemmShape
from runner.kernels.types import DeepGemmKernelType as T

_VERSION = 1


@dataclass(frozen=True)
class RecordedHeaders:
    """Digests of a library's headers where the library itself is not at hand."""

    hashes: Mapping[str, str]

    def header_hash(self, header: str) -> str:
        """See :class:`runner.cache.keys.Headers`."""
        return self.hashes[header]


def step_of(kind: T) -> int:
    """How far apart the M are that a type can be called with."""
    return CONTIGUOUS_M_ALIGNMENT if kind in CONTIGUOUS_TYPES else 1


def merged(tables: Iterable[RecordedTable]) -> RecordedTable:
    """One table of what several of one origin know; they agree where they overlap."""
    first, *others = tables
    runs = {shape: list(found) for shape, found in first.runs.items()}
    headers = dict(first.headers)
    for other in others:
        headers.update(other.headers)
        for shape, found in other.runs.items():
            runs.setdefault(shape, []).extend(found)
    joined = {shape: join_runs(found, step_of(shape.type)) for shape, found in runs.items()}
    return RecordedTable(first.origin, first.recipe, joined, headers)


def write_table(path: Path, table: RecordedTable) -> None:
    """Write a table; it appears whole, and equal tables give equal bytes.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(_to_json(table), separators=(",", ":"))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
            packed.write(text.encode())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_table(path: Path) -> RecordedTable:
    """Read a table.

    Raises:
        UserError: not such a file.
    """
    try:
        with gzip.open(path) as file:
            return _of_json(json.loads(file.read()))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, IndexError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a table of kernels: {error!r}") from None


def _to_json(table: RecordedTable) -> dict[str, Any]:
    kernels: dict[Kernel, int] = {}

    def number(found: Kernels) -> list[int]:
        return [kernels.setdefault(kernel, len(kernels)) for kernel in found]

    gemms = [
        [*_shape_to_json(shape), [[run.first, run.last, number(run.kernels)] for run in runs]]
        for shape, runs in sorted(table.runs.items())
    ]
    origin = table.origin
    return {
        "version": _VERSION,
        "library": origin.library,
        "generation": origin.generation,
        "gpu": origin.gpu,
        "num_sms": origin.num_sms,
        "flags": list(table.recipe.flags),
        "extra_signature": table.recipe.extra_signature,
        "options": table.recipe.options,
        "headers": dict(sorted(table.headers.items())),
        "kernels": [[k.name, k.header, k.entry, list(k.arguments), k.prelude] for k in kernels],
        "gemms": gemms,
    }


def _shape_to_json(shape: GemmShape) -> list[int | str]:
    return [shape.type.name, shape.n, shape.k, shape.num_groups, shape.num_sms]


def _of_json(data: Mapping[str, Any]) -> RecordedTable:
    if data["version"] != _VERSION:
        raise ValueError(f"version {data['version']!r} is not known")
    kernels = [
        Kernel(name, header, entry, tuple(arguments), prelude)
        for name, header, entry, arguments, prelude in data["kernels"]
    ]
    runs = {
        GemmShape(T[kind], *sizes): tuple(
            Run(first, last, tuple(kernels[number] for number in numbers))
            for first, last, numbers in found
        )
        for kind, *sizes, found in data["gemms"]
    }
    recipe = Recipe(
        data["generation"], tuple(data["flags"]), data["extra_signature"], data["options"]
    )
    origin = Origin(
        data["library"],
        data["generation"],
        data["gpu"],
        data["num_sms"],
        recipe.arch,
        Source.RECORDED,
    )
    return RecordedTable(origin, recipe, runs, data["headers"])
