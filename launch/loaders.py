"""What makes a rank's kernels ready before a call, and the locks that ranks take turns with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from runner.build.compiler import LazyJit
from runner.errors import UserError
from runner.files import take_lock
from runner.kernels.kernel import Kernel
from runner.kernels.table import KernelTable
from runner.kernels.types import GemmShape, KernelCall, expand
from runner.planning.plan import plan_of, table_of
from runner.scenario import Scenario
from runner.schedule import Walk

if TYPE_CHECKING:
    from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper


class OwnJit:
    """Our lazy JIT, for machines without a GPU: memory, else disk, else nvcc.

    Without a compiler it makes nothing ready. Walks call nothing, but make the kernels of each M
    ready, in order.
    """

    loads_inside_calls = False

    def __init__(self, jit: LazyJit | None, table: KernelTable) -> None:
        self._jit, self._table = jit, table

    def is_ready(self, call: KernelCall) -> bool:
        return self._jit is None or all(map(self._jit.is_loaded, self._table.kernels_of(call)))

    def prepare(self, call: KernelCall) -> None:
        self.load(self._table.kernels_of(call))

    def load(self, kernels: Sequence[Kernel]) -> None:
        if self._jit is not None:
            for kernel in kernels:
                self._jit.ensure(kernel)

    def walk(self, walk: Walk) -> None:
        self.load(list(self._table.kernel_ranges(walk.shape, expand(walk.steps))))


class LibraryJit:
    """The library's JIT, which loads or compiles inside a call; this knows what is in memory.

    ``load`` calls each kernel once; those whose buffers do not fit are left to their first use.
    """

    loads_inside_calls = True

    def __init__(self, wrapper: DeepGemmWrapper, scenario: Scenario) -> None:
        self.wrapper, self._scenario = wrapper, scenario
        self._loaded: set[Kernel] = set()

    def is_ready(self, call: KernelCall) -> bool:
        return self._loaded.issuperset(table_of(self._scenario).kernels_of(call))

    def prepare(self, call: KernelCall) -> None:
        self._loaded.update(table_of(self._scenario).kernels_of(call))

    def load(self, kernels: Sequence[Kernel]) -> None:
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
"""Makes kernels ready: ``prepare`` before a call, ``load`` from disk, ``walk`` through a GEMM."""


class CompileLocks:
    """One lock a GEMM, so that only one rank of a node compiles its kernels at a time.

    They are files beside the node's cache, as in SGLang, and a holder that dies releases them.
    """

    def __init__(self, cache_root: Path) -> None:
        self._folder = cache_root / "locks"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self._folder}: {error.strerror}") from None

    @contextmanager
    def held(self, shape: GemmShape) -> Iterator[None]:
        """Hold the lock of a GEMM, whatever its M."""
        name = f"{shape.type.name}_n{shape.n}_k{shape.k}_g{shape.num_groups}.lock"
        with (self._folder / name).open("w") as file:
            take_lock(file, self._folder)
            yield
