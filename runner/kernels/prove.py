"""Proof that a cache is complete: call the library with every M, and let it compile nothing."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import Manifest
from runner.errors import UserError
from runner.kernels.installed import Library
from runner.kernels.table import Demand, by_shape
from runner.kernels.types import DeepGemmKernelType, GemmShape
from runner.kernels.worker import ask, shared_out
from runner.standin.build import standin_environment
from runner.standin.gpus import Gpu
from runner.watch.shim import read_records, write_shim


@dataclass(frozen=True)
class Proof:
    """What a walk over a cache found.

    Attributes:
        calls: calls of the library.
        asked: names of kernels that it asked its compiler for.
        added: entries that it added to the cache.
    """

    calls: int
    asked: list[str]
    added: list[str]


@dataclass(frozen=True)
class Prover:
    """Walks a library over a cache.

    Attributes:
        library: the library; this Python has a torch that it works with.
        gpu: the GPU to stand in for; None uses the real one.
        nvcc: the compiler, which is asked for its version alone.
        version_text: what it answers on a stand-in GPU.
        environment: of this process.
        jobs: walks at a time.
    """

    library: Library
    gpu: Gpu | None
    nvcc: Path
    version_text: str
    environment: Mapping[str, str]
    jobs: int

    def prove(
        self,
        cache: KernelCache,
        demands: Sequence[Demand],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Proof:
        """Call every M of the demands; the cache itself is not written.

        Raises:
            UserError: the library cannot be called here.
        """
        done = 0

        def note() -> None:
            nonlocal done
            done += 1
            progress(done, len(demands))

        shares = shared_out(demands, self.jobs)
        with ThreadPoolExecutor(len(shares)) as pool:
            found = list(pool.map(lambda share: self._walk(cache, share, note), shares))
        return Proof(
            calls=sum(len(demand.ms) for demand in demands),
            asked=[name for asked, _ in found for name in asked],
            added=[name for _, added in found for name in added],
        )

    def _walk(
        self, cache: KernelCache, demands: Sequence[Demand], note: Callable[[], None]
    ) -> tuple[list[str], list[str]]:
        with tempfile.TemporaryDirectory(prefix="deepgemm-prove-") as folder:
            place = Path(folder)
            shown = place / "cache"
            (shown / "cache").mkdir(parents=True)
            for entry in cache.entries():
                (shown / "cache" / entry.name).symlink_to(entry.resolve())
            environment = self._environment(place)
            environment["DG_JIT_CACHE_DIR"] = str(shown)
            asked: list[str] = []
            try:
                ask(self.library, demands, environment, place / "words", note)
            except UserError:
                asked = _asked(place)
                if not asked:
                    raise
            added = [path.name for path in (shown / "cache").iterdir() if not path.is_symlink()]
            return asked or _asked(place), sorted(added)

    def _environment(self, place: Path) -> dict[str, str]:
        """A real GPU with a compiler that refuses, or a stand-in and its compiler."""
        if self.gpu is not None:
            return standin_environment(
                self.gpu,
                python=Path(sys.executable),
                environment=self.environment,
                version_text=self.version_text,
                work_dir=place,
            )
        shim = write_shim(place / "nvcc", nvcc=self.nvcc, log_dir=place / "log", forbid=place)
        variables = {"DG_JIT_NVCC_COMPILER": str(shim), "DG_JIT_USE_NVRTC": "0"}
        return {**self.environment, **variables}


def _asked(place: Path) -> list[str]:
    """Kernels that the compiler was asked for, real or stood in."""
    compiles = place / "compiles.txt"
    if compiles.is_file():
        lines = compiles.read_bytes().decode().splitlines()
        return [Path(line.split("\x1f")[1]).parent.name for line in lines]
    log = place / "log"
    return [record.kernel_name for record in read_records(log)] if log.is_dir() else []


def demands_of(manifest: Manifest) -> list[Demand]:
    """The GEMMs that a cache was built for, with every M that its manifest names.

    Raises:
        UserError: it names none, or one that is not known.
    """
    uses = [use for entry in manifest.entries.values() for use in entry.uses]
    if not uses or not manifest.gpu:
        raise UserError("the manifest names no GEMM, or not the GPU: build the cache again")
    return by_shape(Demand(_shape(use), tuple(_expanded(use))) for use in uses)


def _shape(use: Mapping[str, Any]) -> GemmShape:
    try:
        kind = DeepGemmKernelType[use["type"].upper()]
    except KeyError:
        raise UserError(f"the manifest has a GEMM of unknown type {use['type']!r}") from None
    return GemmShape(kind, use["n"], use["k"], use["num_groups"], use.get("num_sms", 132))


def _expanded(use: Mapping[str, Any]) -> Iterable[int]:
    for first, last in use["m_ranges"]:
        yield from range(first, last + 1, use.get("m_step", 1))
