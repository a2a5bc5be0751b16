"""Kernel tables as files of gzipped JSON, and the tables that are bundled with the package."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from functools import lru_cache
from importlib import resources
from pathlib import Path

from runner.errors import UserError
from runner.files import parse_json, replacing
from runner.kernels.call_template import CallShape
from runner.kernels.kernel import Kernel
from runner.kernels.keys import Recipe
from runner.kernels.table import Origin, RecordedTable, Run, Shape, Source
from runner.kernels.types import DeepGemmKernelType, GemmShape
from runner.standin.gpus import Gpu, gpu_named

BUNDLED_GPUS = ("h200", "h20", "b200", "gb300", "rtx-pro-6000")
BUNDLED_FOLDER = Path(str(resources.files("runner.kernels"))) / "tables"

_VERSION = 1


def bundled_gpu(gpu: Gpu) -> str:
    """The GPU whose tables also apply to ``gpu``: only architecture and SMs decide the kernels."""
    for name in BUNDLED_GPUS:
        other = gpu_named(name)
        if (other.major, other.minor, other.num_sms) == (gpu.major, gpu.minor, gpu.num_sms):
            return name
    return gpu.name


def bundled_libraries(gpu: str) -> list[str]:
    """Names and versions of the libraries with a table for a GPU, newest first.

    SGLang's library comes before all others, because more than one server ships it.
    """

    def rank(title: str) -> tuple[bool, list[int]]:
        return title.startswith("sgl-deep-gemm "), [int(x) for x in re.findall(r"\d+", title)]

    suffix = f"-{gpu}.json.gz"
    stems = (path.name.removesuffix(suffix) for path in BUNDLED_FOLDER.glob(f"*{suffix}"))
    return sorted((" ".join(stem.rsplit("-", 1)) for stem in stems), key=rank, reverse=True)


@lru_cache(maxsize=8)
def bundled_table(title: str, gpu: str) -> RecordedTable | None:
    """The table of a library (name and version) on a GPU; None if it is not bundled."""
    path = BUNDLED_FOLDER / f"{title.replace(' ', '-')}-{gpu}.json.gz"
    return read_table(path) if path.is_file() else None


def write_table(path: Path, table: RecordedTable) -> None:
    """Write a table atomically; equal tables produce equal bytes."""
    indices: dict[Kernel, int] = {}
    gemms: list[object] = []
    calls: list[object] = []
    for shape in sorted(table.runs, key=lambda shape: (isinstance(shape, CallShape), shape)):
        numbered = [
            (run.first, run.last, [indices.setdefault(k, len(indices)) for k in run.kernels])
            for run in table.runs[shape]
        ]
        if isinstance(shape, CallShape):
            calls.append((shape.text, shape.num_sms, shape.m_step, numbered))
        else:
            sizes = (shape.n, shape.k, shape.num_groups, shape.num_sms)
            gemms.append((shape.type.name, *sizes, numbered))
    data = {
        "version": _VERSION,
        "library": table.origin.library,
        "generation": table.origin.generation,
        "gpu": table.origin.gpu,
        "num_sms": table.origin.num_sms,
        "flags": table.recipe.flags,
        "extra_signature": table.recipe.extra_signature,
        "options": table.recipe.options,
        "headers": dict(sorted(table.headers.items())),
        "kernels": [(k.name, k.header, k.entry, k.arguments, k.prelude) for k in indices],
        "gemms": gemms,
    }
    if calls:
        data["calls"] = calls
    with (
        replacing(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
    ):
        packed.write(json.dumps(data, separators=(",", ":")).encode())


def read_table(path: Path) -> RecordedTable:
    """Read a table; raises UserError if the file is not a table."""
    try:
        with gzip.open(path) as file:
            return _parse(file.read())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, IndexError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a kernel table: {error!r}") from None


def _parse(text: bytes) -> RecordedTable:
    data = parse_json(text)
    if data["version"] != _VERSION:
        raise ValueError(f"version {data['version']!r} is not known")
    kernels = [
        Kernel(name, header, entry, tuple(arguments), prelude)
        for name, header, entry, arguments, prelude in data["kernels"]
    ]

    def runs_of(found: list[tuple[int, int, list[int]]]) -> tuple[Run, ...]:
        return tuple(Run(a, b, tuple(kernels[index] for index in ran)) for a, b, ran in found)

    runs: dict[Shape, tuple[Run, ...]] = {
        GemmShape(DeepGemmKernelType[kind], *sizes): runs_of(found)
        for kind, *sizes, found in data["gemms"]
    }
    for call, sms, step, found in data.get("calls", ()):
        runs[CallShape(call, sms, step)] = runs_of(found)
    generation = data["generation"]
    recipe = Recipe(generation, tuple(data["flags"]), data["extra_signature"], data["options"])
    gpu, num_sms = data["gpu"], data["num_sms"]
    origin = Origin(data["library"], generation, gpu, num_sms, recipe.arch, Source.RECORDED)
    return RecordedTable(origin, recipe, runs, data["headers"])
