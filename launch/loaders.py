"""Loaders, which make a rank's kernels ready before a call, and locks for taking turns."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from runner.build.compiler import NvccCompiler
from runner.cache.kernel_cache import KernelCache
from runner.errors import UserError
from runner.files import take_lock
from runner.kernels.entry import CUBIN
from runner.kernels.kernel import Kernel
from runner.kernels.table import KernelTable
from runner.kernels.types import GemmShape, KernelCall, expand
from runner.planning.plan import plan_of, table_of
from runner.scenario import Scenario
from runner.schedule import Walk

if TYPE_CHECKING:
    from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper


class OwnJit:
    """Our lazy JIT for machines without a GPU: it looks in memory, then on disk, then runs nvcc.

    Without a compiler it does nothing. A walk makes the kernels of each M ready in order, without
    calling them. As with the library, two processes that miss a kernel at the same time both
    compile it.
    """

    loads_inside_calls = False

    def __init__(
        self,
        table: KernelTable,
        compiler: NvccCompiler | None = None,
        cache: KernelCache | None = None,
    ) -> None:
        self._table, self._compiler, self._cache = table, compiler, cache
        self.loaded: set[Kernel] = set()

    def is_ready(self, call: KernelCall) -> bool:
        return self._compiler is None or self.loaded.issuperset(self._table.kernels_of(call))

    def prepare(self, call: KernelCall) -> None:
        self.load(self._table.kernels_of(call))

    def load(self, kernels: Iterable[Kernel]) -> None:
        if self._compiler is None or self._cache is None:
            return
        for kernel in kernels:
            if kernel not in self.loaded:
                _load(kernel, self._compiler, self._cache)
                self.loaded.add(kernel)

    def walk(self, walk: Walk) -> None:
        self.load(self._table.kernel_ranges(walk.shape, expand(walk.steps)))


def _load(kernel: Kernel, compiler: NvccCompiler, cache: KernelCache) -> None:
    keys = compiler.keys
    key, source = keys.cache_key(kernel), keys.source(kernel)
    if not cache.has(key):
        scratch = cache.root.absolute() / "tmp"
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            cubin = compiler.compile(source, Path(folder))
        cache.put(key, source, cubin, keys.extra_files, prefix="lazy-")
    # A real load reads the whole file, so read it to take as long.
    (cache.entry(key) / CUBIN).read_bytes()


class LibraryJit:
    """The library's JIT, which loads or compiles inside a call; we track what is in memory.

    ``load`` calls each kernel once; kernels whose buffers do not fit load at their first use.
    """

    loads_inside_calls = True

    def __init__(self, wrapper: DeepGemmWrapper, scenario: Scenario) -> None:
        self.wrapper, self._scenario = wrapper, scenario
        self._loaded: set[Kernel] = set()

    def is_ready(self, call: KernelCall) -> bool:
        return self._loaded.issuperset(table_of(self._scenario).kernels_of(call))

    def prepare(self, call: KernelCall) -> None:
        self._loaded.update(table_of(self._scenario).kernels_of(call))

    def load(self, kernels: Iterable[Kernel]) -> None:
        from runner.deep_gemm_wrapper.walker import call_each

        new = set(kernels) - self._loaded
        uses = [(item.kernel, item.uses[0]) for item in plan_of(self._scenario).kernels]
        calls = [(kernel, use.shape, use.m_ranges[0][0]) for kernel, use in uses if kernel in new]
        self._loaded.update(call_each(self.wrapper, calls))

    def walk(self, walk: Walk) -> None:
        from runner.deep_gemm_wrapper.walker import walk_list

        walk_list(self.wrapper, walk)
        self._loaded.update(table_of(self._scenario).kernel_ranges(walk.shape, expand(walk.steps)))


KernelLoader = OwnJit | LibraryJit
"""Makes kernels ready: ``prepare`` before a call, ``load`` from disk, ``walk`` over a GEMM's M."""


class CompileLocks:
    """One lock per GEMM, so that only one rank of a node compiles a GEMM's kernels at a time.

    Locks are files in the node's cache directory, as in SGLang; a holder that dies releases them.
    """

    def __init__(self, cache_root: Path) -> None:
        self._folder = cache_root / "locks"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self._folder}: {error.strerror}") from None

    @contextmanager
    def held(self, shape: GemmShape) -> Iterator[None]:
        """Hold the lock of a GEMM; it covers every M."""
        name = f"{shape.type.name}_n{shape.n}_k{shape.k}_g{shape.num_groups}.lock"
        with (self._folder / name).open("w") as file:
            take_lock(file, self._folder)
            yield
