"""Tables: for each GEMM, which kernels run at which M, and whose word that is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

from runner.cache.keys import Recipe
from runner.errors import UserError
from runner.kernels.kernel import Kernel
from runner.kernels.types import GemmShape, KernelCall

MRanges = tuple[tuple[int, int], ...]
"""Ascending, disjoint (first, last) pairs. For contiguous types only multiples of 128 count."""

Kernels = tuple[Kernel, ...]
"""What one call runs, in order; empty where it runs no kernel of DeepGEMM's."""


@dataclass(frozen=True)
class Demand:
    """A GEMM that a deployment runs.

    Attributes:
        shape: the GEMM.
        ms: every M it can be run with, ascending.
        stages: pipeline stages that run it.
    """

    shape: GemmShape
    ms: Sequence[int]
    stages: tuple[int, ...] = (0,)


class Source(Enum):
    """Where a table's answers come from."""

    RULES = "by our rules"
    LIBRARY = "asked on a stand-in GPU"
    RECORDED = "asked before, on a stand-in GPU"


@dataclass(frozen=True)
class Origin:
    """Whose answers a table holds.

    Attributes:
        library: name and version, such as ``sgl-deep-gemm 0.2.5``.
        generation: of the library's JIT: 1 up to sgl-deep-gemm 0.1.x, 2 from 0.2.0 on.
        gpu: name of the GPU.
        num_sms: its SMs.
        arch: nvcc's name of the target, such as ``sm_100f``.
        source: how the answers were had.
    """

    library: str
    generation: int
    gpu: str
    num_sms: int
    arch: str
    source: Source

    def describe(self) -> str:
        """One line for the head of an output."""
        return (
            f"{self.library} (JIT {self.generation}), {self.gpu} ({self.num_sms} SMs, "
            f"{self.arch}), {self.source.value}"
        )


class KernelTable(ABC):
    """Which kernels a library runs on a GPU, by GEMM and M.

    Attributes:
        origin: whose answers these are.
        recipe: how the library compiles the kernels.
    """

    origin: Origin
    recipe: Recipe

    def table(self, demands: Callable[[], Iterable[Demand]]) -> KernelTable:
        """The table itself: it is a source of what it knows, and of nothing else."""
        return self

    @abstractmethod
    def parts(self, shape: GemmShape, ms: Sequence[int]) -> list[tuple[Kernels, int, int]]:
        """Ascending ``ms`` cut where other kernels run: (kernels, low, high) for ms[low:high].

        Raises:
            UserError: an M that the table does not know.
        """

    @abstractmethod
    def kernels_of(self, call: KernelCall) -> Kernels:
        """Kernels that the library runs for one call; none where ``m`` is 0.

        Raises:
            UserError: a call that the table does not know.
        """

    def kernel_ranges(self, shape: GemmShape, ms: Sequence[int]) -> dict[Kernel, MRanges]:
        """Kernels of one GEMM over ascending ``ms``, each with the M that run it."""
        found: dict[Kernel, list[tuple[int, int]]] = {}
        before = None
        for kernels, low, high in self.parts(shape, ms):
            for kernel in dict.fromkeys(kernels):
                ranges = found.setdefault(kernel, [])
                if ranges and ranges[-1][1] == before:
                    ranges[-1] = (ranges[-1][0], ms[high - 1])
                else:
                    ranges.append((ms[low], ms[high - 1]))
            before = ms[high - 1]
        return {kernel: tuple(ranges) for kernel, ranges in found.items()}


@dataclass(frozen=True)
class Run:
    """Consecutive M of one GEMM that run the same kernels, from ``first`` to ``last``."""

    first: int
    last: int
    kernels: Kernels


@dataclass(frozen=True, eq=False)
class RecordedTable(KernelTable):
    """A table as data.

    Attributes:
        runs: for each GEMM what is known, ascending and disjoint.
        headers: digests of the library's headers that the kernels include.
    """

    origin: Origin
    recipe: Recipe
    runs: Mapping[GemmShape, tuple[Run, ...]]
    headers: Mapping[str, str] = field(default_factory=dict)
    _known: dict[KernelCall, Kernels] = field(default_factory=dict, repr=False)

    def parts(self, shape: GemmShape, ms: Sequence[int]) -> list[tuple[Kernels, int, int]]:
        """See :meth:`KernelTable.parts`."""
        found: list[tuple[Kernels, int, int]] = []
        at = 0
        for run in self.runs.get(shape, ()):
            low, high = bisect_left(ms, run.first, at), bisect_right(ms, run.last, at)
            if low >= high:
                continue
            if low > at:
                break
            if found and found[-1][0] == run.kernels:
                found[-1] = (run.kernels, found[-1][1], high)
            else:
                found.append((run.kernels, low, high))
            at = high
        if at < len(ms):
            raise self._unknown(shape, ms[at])
        return found

    def kernels_of(self, call: KernelCall) -> Kernels:
        """See :meth:`KernelTable.kernels_of`."""
        if call.m < 1:
            return ()
        if call not in self._known:
            shape = GemmShape(call.type, call.n, call.k, call.num_groups, call.num_sms)
            ((kernels, _, _),) = self.parts(shape, (call.m,))
            self._known[call] = kernels
        return self._known[call]

    def lacking(self, demand: Demand) -> list[int]:
        """The M of a demand that the table does not know."""
        runs = self.runs.get(demand.shape, ())
        firsts = [run.first for run in runs]
        known = (bisect_right(firsts, m) - 1 for m in demand.ms)
        return [
            m
            for m, index in zip(demand.ms, known, strict=True)
            if index < 0 or m > runs[index].last
        ]

    def _unknown(self, shape: GemmShape, m: int) -> UserError:
        return UserError(
            f"no table of {self.origin.library} on {self.origin.gpu} has {shape.describe()} with "
            f"M {m} on {shape.num_sms} SMs: ask the library itself (--library, where it is "
            "installed with a CUDA build of torch)"
        )


def join_runs(runs: Iterable[Run], step: int) -> tuple[Run, ...]:
    """Runs in order, each M once; runs of the same kernels that meet are one.

    Neighbours are ``step`` apart. Runs that overlap agree, since they are of one library.
    """
    joined: list[Run] = []
    for run in sorted(runs, key=lambda run: run.first):
        before = joined[-1] if joined else None
        if before is not None and (
            run.first <= before.last
            or (run.kernels == before.kernels and run.first == before.last + step)
        ):
            joined[-1] = Run(before.first, max(before.last, run.last), before.kernels)
        else:
            joined.append(run)
    return tuple(joined)


def by_shape(demands: Iterable[Demand]) -> list[Demand]:
    """One demand for each GEMM, with every M that any of the given ones has."""
    found: dict[GemmShape, set[int]] = {}
    for demand in demands:
        found.setdefault(demand.shape, set()).update(demand.ms)
    return [Demand(shape, tuple(sorted(ms))) for shape, ms in found.items() if ms]


def union(many: Iterable[MRanges]) -> MRanges:
    """Ranges that hold exactly the integers that any of the given ranges holds."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(pair for ranges in many for pair in ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


def cut_at(starts: Iterable[int], ms: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Index ranges (low, high) of ascending ``ms`` between ``starts``; empty ones are left out."""
    edges = [bisect_left(ms, start) for start in starts] + [len(ms)]
    return ((low, high) for low, high in pairwise(edges) if low < high)
