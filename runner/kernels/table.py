"""Kernel tables: which kernels each GEMM runs at which M, and where that is known from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from runner.errors import UserError
from runner.kernels.heuristics_sm90 import CONTIGUOUS_M_ALIGNMENT
from runner.kernels.kernel import Kernel
from runner.kernels.keys import Recipe
from runner.kernels.types import CONTIGUOUS_TYPES, GemmShape, KernelCall

MRanges = tuple[tuple[int, int], ...]
"""Ascending, disjoint (first, last) pairs. For contiguous types only multiples of 128 count."""

Kernels = tuple[Kernel, ...]
"""What one call runs, in order; empty if it runs no kernel of DeepGEMM's."""

Part = tuple[Kernels, int, int]
"""Kernels that all of ``ms[low:high]`` run: (kernels, low, high)."""


@dataclass(frozen=True)
class Demand:
    """A GEMM that a deployment runs: with which M, ascending, and on which pipeline stages."""

    shape: GemmShape
    ms: Sequence[int]
    stages: tuple[int, ...] = (0,)


class Source(Enum):
    """How a table's answers were found."""

    RULES = "by our rules"
    LIBRARY = "asked on a stand-in GPU"
    RECORDED = "asked before, on a stand-in GPU"


@dataclass(frozen=True)
class Origin:
    """Whose kernels a table lists.

    Attributes:
        library: name and version, such as ``sgl-deep-gemm 0.2.5``.
        generation: of the library's JIT: 1 up to sgl-deep-gemm 0.1.x, 2 from 0.2.0 on.
        arch: nvcc's name of the target, such as ``sm_100f``.
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
    """Which kernels a library runs on a GPU, by GEMM and M; compiled as ``recipe`` says."""

    origin: Origin
    recipe: Recipe

    def table(self, demands: Callable[[], Iterable[Demand]]) -> KernelTable:
        """The table itself: every table is a :class:`runner.kernels.source.KernelSource`."""
        return self

    @abstractmethod
    def parts(self, shape: GemmShape, ms: Sequence[int]) -> list[Part]:
        """Ascending ``ms`` cut where the kernels change.

        Raises:
            UserError: an M that the table does not know.
        """

    @abstractmethod
    def kernels_of(self, call: KernelCall) -> Kernels:
        """Kernels that the library runs for one call; none if ``m`` is 0."""

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


def append_part(parts: list[Part], kernels: Kernels, low: int, high: int) -> None:
    """Add ``ms[low:high]``, to the last part if that runs the same kernels."""
    if parts and parts[-1][0] == kernels:
        low = parts.pop()[1]
    parts.append((kernels, low, high))


@dataclass(frozen=True)
class Run:
    """Consecutive M of one GEMM that run the same kernels, from ``first`` to ``last``."""

    first: int
    last: int
    kernels: Kernels


@dataclass(frozen=True, eq=False)
class RecordedTable(KernelTable):
    """A table as data: what is known of each GEMM, and hashes of the headers of its kernels."""

    origin: Origin
    recipe: Recipe
    runs: Mapping[GemmShape, tuple[Run, ...]]
    headers: Mapping[str, str] = field(default_factory=dict)
    _by_call: dict[KernelCall, Kernels] = field(default_factory=dict, repr=False)

    def parts(self, shape: GemmShape, ms: Sequence[int]) -> list[Part]:
        found: list[Part] = []
        at = 0
        for run in self.runs.get(shape, ()):
            low, high = bisect_left(ms, run.first, at), bisect_right(ms, run.last, at)
            if low > at:
                break
            if low < high:
                append_part(found, run.kernels, low, high)
                at = high
        if at < len(ms):
            raise UserError(
                f"no table of {self.origin.library} on {self.origin.gpu} has {shape.describe()} "
                f"with M {ms[at]} on {shape.num_sms} SMs: ask the library itself (--library, where "
                "it is installed with a CUDA build of torch)"
            )
        return found

    def kernels_of(self, call: KernelCall) -> Kernels:
        if call.m < 1:
            return ()
        if call not in self._by_call:
            shape = GemmShape(call.type, call.n, call.k, call.num_groups, call.num_sms)
            self._by_call[call] = self.parts(shape, (call.m,))[0][0]
        return self._by_call[call]

    def header_hash(self, header: str) -> str:
        """Hash of a header: a table stands in for the headers of a library that is not here."""
        return self.headers[header]

    def lacking(self, demand: Demand) -> list[int]:
        """The M of a demand that the table does not know."""
        runs = self.runs.get(demand.shape, ())
        firsts = [run.first for run in runs]
        lasts = [-1, *(run.last for run in runs)]
        return [m for m in demand.ms if m > lasts[bisect_right(firsts, m)]]


def m_step(shape: GemmShape) -> int:
    """How far apart the M are that a GEMM can be called with."""
    return CONTIGUOUS_M_ALIGNMENT if shape.type in CONTIGUOUS_TYPES else 1


def merge_tables(one: RecordedTable, other: RecordedTable) -> RecordedTable:
    """One table of all that two tables of one origin know; they agree where they overlap."""
    runs = dict(one.runs)
    for shape, more in other.runs.items():
        runs[shape] = join_runs(shape, [*runs.get(shape, ()), *more])
    return RecordedTable(one.origin, one.recipe, runs, {**one.headers, **other.headers})


def join_runs(shape: GemmShape, runs: Iterable[Run]) -> tuple[Run, ...]:
    """Runs of one GEMM in order, as few as there can be; runs that overlap agree."""
    joined: list[Run] = []
    for run in sorted(runs, key=lambda run: run.first):
        before = joined[-1] if joined else None
        if before is not None and (
            run.first <= before.last
            or (run.kernels == before.kernels and run.first == before.last + m_step(shape))
        ):
            joined[-1] = Run(before.first, max(before.last, run.last), before.kernels)
        else:
            joined.append(run)
    return tuple(joined)


def by_shape(demands: Iterable[Demand]) -> list[Demand]:
    """One demand for each GEMM, with every M of all its demands."""
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
