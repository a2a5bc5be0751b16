"""Kernel tables: the kernels that each GEMM runs at each M, and the origin of this information."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from runner.errors import UserError
from runner.kernels.call_template import CallShape
from runner.kernels.kernel import Kernel
from runner.kernels.keys import Recipe
from runner.kernels.types import GemmShape, KernelCall

MRanges = tuple[tuple[int, int], ...]
"""Ascending, disjoint (first, last) pairs. For contiguous types only multiples of 128 count."""

Kernels = tuple[Kernel, ...]
"""The kernels that one call runs, in order; empty if it runs none of DeepGEMM's."""

Shape = GemmShape | CallShape
"""What is called with many M: a GEMM by its sizes, or a recorded call."""

Part = tuple[Kernels, int, int]
"""(kernels, low, high): the kernels that every M in ``ms[low:high]`` runs."""


@dataclass(frozen=True)
class Demand:
    """A GEMM that a deployment runs, with its M in ascending order and its pipeline stages."""

    shape: Shape
    ms: Sequence[int]
    stages: tuple[int, ...] = (0,)


class Source(Enum):
    """How a table's answers were obtained."""

    RULES = "by our rules"
    LIBRARY = "asked on a stand-in GPU"
    RECORDED = "recorded on a stand-in GPU"


@dataclass(frozen=True)
class Origin:
    """The library, the GPU and the source of a table.

    Attributes:
        library: name and version, such as ``sgl-deep-gemm 0.2.5``.
        generation: generation of the library's JIT: 1 up to sgl-deep-gemm 0.1.x, 2 since 0.2.0.
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
    """The kernels that a library runs on a GPU, by GEMM and M; ``recipe`` says how to compile."""

    origin: Origin
    recipe: Recipe

    def table(self, demands: Callable[[], Iterable[Demand]]) -> KernelTable:
        """The table itself: every table is a :class:`runner.kernels.source.KernelSource`."""
        return self

    @abstractmethod
    def parts(self, shape: Shape, ms: Sequence[int]) -> list[Part]:
        """Split ascending ``ms`` where the kernels change.

        Raises:
            UserError: the table does not cover an M.
        """

    @abstractmethod
    def kernels_of(self, call: KernelCall) -> Kernels:
        """Kernels that the library runs for one call; none if ``m`` is 0."""

    def kernel_ranges(self, shape: Shape, ms: Sequence[int]) -> dict[Kernel, MRanges]:
        """Kernels of one GEMM over ascending ``ms``, each with the ranges of M that run it."""
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
    """Append ``ms[low:high]``, or extend the last part if it runs the same kernels."""
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
    """A table as data: runs of M for each GEMM, and hashes of the headers that kernels include."""

    origin: Origin
    recipe: Recipe
    runs: Mapping[Shape, tuple[Run, ...]]
    headers: Mapping[str, str] = field(default_factory=dict)
    _by_call: dict[KernelCall, Kernels] = field(default_factory=dict, repr=False)

    def parts(self, shape: Shape, ms: Sequence[int]) -> list[Part]:
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
            self._by_call[call] = self.parts(call.shape, (call.m,))[0][0]
        return self._by_call[call]

    def header_hash(self, header: str) -> str:
        """Hash of a header; this makes a table usable as ``Headers`` without the library."""
        return self.headers[header]

    def lacking(self, demand: Demand) -> list[int]:
        """The M of a demand that the table does not cover."""
        runs = self.runs.get(demand.shape, ())
        firsts = [run.first for run in runs]
        lasts = [-1, *(run.last for run in runs)]
        return [m for m in demand.ms if m > lasts[bisect_right(firsts, m)]]


def merge_tables(one: RecordedTable, other: RecordedTable) -> RecordedTable:
    """Merge two tables of the same origin, which agree where they overlap."""
    runs = dict(one.runs)
    for shape, more in other.runs.items():
        runs[shape] = join_runs(shape, [*runs.get(shape, ()), *more])
    return RecordedTable(one.origin, one.recipe, runs, {**one.headers, **other.headers})


def join_runs(shape: Shape, runs: Iterable[Run]) -> tuple[Run, ...]:
    """Sort the runs of one GEMM and join them into as few as possible; overlapping runs agree."""
    joined: list[Run] = []
    for run in sorted(runs, key=lambda run: run.first):
        before = joined[-1] if joined else None
        if before is not None and (
            run.first <= before.last
            or (run.kernels == before.kernels and run.first == before.last + shape.m_step)
        ):
            joined[-1] = Run(before.first, max(before.last, run.last), before.kernels)
        else:
            joined.append(run)
    return tuple(joined)


def by_shape(demands: Iterable[Demand]) -> list[Demand]:
    """Merge demands so that each GEMM has one demand with all its M."""
    found: dict[Shape, set[int]] = {}
    for demand in demands:
        found.setdefault(demand.shape, set()).update(demand.ms)
    return [Demand(shape, tuple(sorted(ms))) for shape, ms in found.items() if ms]


def union(many: Iterable[MRanges]) -> MRanges:
    """The union of ranges: contains exactly the integers that are in any of them."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(pair for ranges in many for pair in ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)
