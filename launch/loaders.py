"""What makes kernels ready before a call: the library's own JIT, or ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from runner.build.lazy import LazyJit
from runner.kernels.kernel import Kernel
from runner.kernels.table import KernelTable
from runner.kernels.types import expand
from runner.schedule import Walk


class KernelLoader(Protocol):
    """Makes kernels ready before a call."""

    def lacks(self, kernels: Sequence[Kernel]) -> bool:
        """Whether any of them is not in memory, so that a call of them is a first use."""

    def prepare(self, kernels: Sequence[Kernel]) -> None:
        """Load or compile what is not in memory, or take note that the call is about to."""

    def load(self, kernels: Sequence[Kernel]) -> None:
        """Bring kernels that are on disk into memory."""

    def walk(self, walk: Walk) -> None:
        """Call a GEMM with every M of a list, so that what it needs is there afterwards."""


class OwnJit:
    """Our own lazy JIT, for machines without a GPU; without a compiler it only keeps track."""

    def __init__(self, jit: LazyJit | None, table: KernelTable) -> None:
        self._jit, self._table = jit, table

    def lacks(self, kernels: Sequence[Kernel]) -> bool:
        """See the protocol."""
        return self._jit is not None and not all(map(self._jit.is_loaded, kernels))

    def prepare(self, kernels: Sequence[Kernel]) -> None:
        """See the protocol."""
        if self._jit is not None:
            for kernel in kernels:
                self._jit.ensure(kernel)

    def load(self, kernels: Sequence[Kernel]) -> None:
        """See the protocol."""
        self.prepare(kernels)

    def walk(self, walk: Walk) -> None:
        """Nothing is called here: what each M needs is made ready, in order."""
        for kernel in self._table.kernel_ranges(walk.shape, expand(walk.steps)):
            self.prepare([kernel])


class LibraryJit:
    """The library's own JIT: it loads or compiles inside the call; we only know which are new.

    Args:
        call_each: makes the library load kernels by calling each once; returns those it called.
        call_all: calls a GEMM with every M of a walk.
        table: which kernels walks run.
    """

    def __init__(
        self,
        call_each: Callable[[Sequence[Kernel]], Sequence[Kernel]],
        call_all: Callable[[Walk], None],
        table: KernelTable,
    ) -> None:
        self._seen: set[Kernel] = set()
        self._call_each, self._call_all, self._table = call_each, call_all, table

    def lacks(self, kernels: Sequence[Kernel]) -> bool:
        """See the protocol."""
        return not self._seen.issuperset(kernels)

    def prepare(self, kernels: Sequence[Kernel]) -> None:
        """See the protocol."""
        self._seen.update(kernels)

    def load(self, kernels: Sequence[Kernel]) -> None:
        """See the protocol."""
        self._seen.update(
            self._call_each([kernel for kernel in kernels if kernel not in self._seen])
        )

    def walk(self, walk: Walk) -> None:
        """See the protocol."""
        self._call_all(walk)
        self._seen.update(self._table.kernel_ranges(walk.shape, expand(walk.steps)))
