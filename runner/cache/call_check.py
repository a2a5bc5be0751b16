"""Check that a cache is complete: the library, called with every M, must compile nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runner.cache.kernel_cache import KernelCache
from runner.cache.machine import TargetMachine
from runner.cache.manifest import Manifest, Use
from runner.errors import UserError, WorkFailedError
from runner.kernels.call_template import CallShape
from runner.kernels.library_calls import call_library
from runner.kernels.nvcc import find_nvcc
from runner.kernels.table import Demand, Shape, by_shape
from runner.kernels.types import DeepGemmKernelType, GemmShape
from runner.standin.build import read_compiles, standin_environment
from runner.standin.gpus import gpu_named
from runner.watch.shim import read_records, write_shim

_GPU_DRIVER = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class CallReport:
    """What a library did on a cache: the names of entries that it compiled and that it added."""

    where: str
    calls: int
    compiled: list[str]
    added: list[str]


def call_on_cache(
    cache: KernelCache,
    manifest: Manifest,
    machine: TargetMachine,
    *,
    jobs: int,
    progress: Callable[[int, int], None],
) -> CallReport:
    """Call the library with every M of the manifest's GEMMs, without writing to the cache.

    Without a GPU here, a stand-in replaces the manifest's GPU; see ``call_library`` for the other
    arguments and the errors.
    """
    demands = _demands(manifest)
    with tempfile.TemporaryDirectory(prefix="deepgemm-verify-") as folder:
        work = Path(folder)
        entries = work / "cache" / "cache"
        entries.mkdir(parents=True)
        for entry in cache.entries():
            (entries / entry.name).symlink_to(entry.resolve())
        environment = _environment(work, manifest, machine)
        environment["DG_JIT_CACHE_DIR"] = str(work / "cache")
        failure = None
        try:
            call_library(machine.library, demands, environment, jobs=jobs, progress=progress)
        except (UserError, WorkFailedError) as error:
            failure = error
        compiled = [Path(source).parent.name for source, *_ in read_compiles(work)]
        compiled += [record.kernel_name for record in read_records(work / "log")]
        if failure is not None and not compiled:
            raise failure
        added = sorted(path.name for path in entries.iterdir() if not path.is_symlink())
    where = "the GPU here" if _GPU_DRIVER.exists() else f"a stand-in {manifest.gpu}"
    return CallReport(where, sum(len(demand.ms) for demand in demands), compiled, added)


def _environment(work: Path, manifest: Manifest, machine: TargetMachine) -> dict[str, str]:
    """Variables for the GPU here with a compiler that refuses to compile, or for a stand-in GPU."""
    if not _GPU_DRIVER.exists():
        return standin_environment(
            gpu_named(manifest.gpu, manifest.num_sms),
            environment=os.environ,
            version_text=machine.version_text,
            work_dir=work,
        )
    nvcc = find_nvcc(machine.environ)
    if nvcc is None:
        raise UserError("--call on a GPU needs nvcc: the library reads its version")
    shim = write_shim(work / "nvcc", nvcc=nvcc, log_dir=work / "log", forbid=work)
    return {**os.environ, "DG_JIT_NVCC_COMPILER": str(shim), "DG_JIT_USE_NVRTC": "0"}


def _demands(manifest: Manifest) -> list[Demand]:
    """The GEMMs that a cache was built for, with every M that its manifest lists."""
    uses = [use for entry in manifest.entries.values() for use in entry.uses]
    if not uses or not manifest.gpu:
        raise UserError("the manifest names no GEMM, or no GPU: build the cache again")
    demands = []
    for use in uses:
        shape, step = _shape_of(use), use.get("m_step", 1)
        ms = [m for first, last in use["m_ranges"] for m in range(first, last + 1, step)]
        demands.append(Demand(shape, ms))
    return by_shape(demands)


def _shape_of(use: Use) -> Shape:
    if "call" in use:
        return CallShape(use["call"], use["num_sms"], use["m_step"])
    try:
        kind = DeepGemmKernelType[use["type"].upper()]
    except KeyError:
        raise UserError(
            f"the manifest has a GEMM of unknown type {use['type']!r}: verify it with the version "
            "that built it"
        ) from None
    return GemmShape(kind, use["n"], use["k"], use["num_groups"], use.get("num_sms", 132))
