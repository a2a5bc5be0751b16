"""The plan: the exact set of kernels that any M of given GEMMs can need."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from runner.jit.kernel_type import DeepGemmKernelType, KernelCall
from runner.jit.kernels import Kernel
from runner.jit.rules import KNOWN_RULES, JitRules

MRanges = tuple[tuple[int, int], ...]
"""Ascending, disjoint (first, last) pairs. For contiguous types only multiples of 128 count."""


@dataclass(frozen=True, slots=True, order=True)
class GemmShape:
    """A wrapper entry point with everything but its M; fields as in :class:`KernelCall`."""

    type: DeepGemmKernelType
    n: int
    k: int
    num_groups: int
    num_sms: int

    def call(self, m: int) -> KernelCall:
        """The call with ``m`` rows."""
        return KernelCall(self.type, m, self.n, self.k, self.num_groups, self.num_sms)

    def describe(self) -> str:
        """``type:N:K[:GROUPS]``, as ``runner plan --gemm`` takes it."""
        always = self.type is DeepGemmKernelType.TF32_HC_PRENORM_GEMM
        groups = f":{self.num_groups}" if always or self.num_groups > 1 else ""
        return f"{self.type.name.lower()}:{self.n}:{self.k}{groups}"


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


@dataclass(frozen=True, slots=True)
class KernelUse:
    """The M of one GEMM that run a kernel."""

    shape: GemmShape
    m_ranges: MRanges
    stages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlannedKernel:
    """A kernel and all that needs it."""

    kernel: Kernel
    uses: tuple[KernelUse, ...]

    @property
    def m_ranges(self) -> MRanges:
        """M of any of its GEMMs."""
        return union(use.m_ranges for use in self.uses)

    @property
    def stages(self) -> tuple[int, ...]:
        """Pipeline stages that need it."""
        return tuple(sorted({stage for use in self.uses for stage in use.stages}))


@dataclass(frozen=True)
class Plan:
    """Distinct kernels, in order of first need, with what they are needed for."""

    kernels: tuple[PlannedKernel, ...]
    demands: tuple[Demand, ...]
    rules: JitRules

    def needed_by(self, stages: Collection[int]) -> list[PlannedKernel]:
        """Kernels that any of the stages can need."""
        return [item for item in self.kernels if not set(stages).isdisjoint(item.stages)]

    def uncovered(
        self, covered: Collection[Kernel], stages: Collection[int] | None = None
    ) -> list[KernelUse]:
        """M of each GEMM that would still compile if only ``covered`` were there.

        ``stages`` leaves the GEMMs that none of them runs out; None takes all.
        """
        missing: dict[GemmShape, list[KernelUse]] = {}
        for planned in self.kernels:
            if planned.kernel not in covered:
                for use in planned.uses:
                    if stages is None or not set(stages).isdisjoint(use.stages):
                        missing.setdefault(use.shape, []).append(use)
        return [
            KernelUse(shape, union(use.m_ranges for use in uses), uses[0].stages)
            for shape, uses in missing.items()
        ]


def make_plan(demands: Iterable[Demand], rules: JitRules = KNOWN_RULES[0]) -> Plan:
    """Plan all demands; kernels that several share are one."""
    given = tuple(demands)
    uses: dict[Kernel, list[KernelUse]] = {}
    for demand in given:
        for kernel, m_ranges in kernel_ranges(demand.shape, demand.ms, rules).items():
            uses.setdefault(kernel, []).append(KernelUse(demand.shape, m_ranges, demand.stages))
    kernels = tuple(PlannedKernel(kernel, tuple(found)) for kernel, found in uses.items())
    return Plan(kernels, given, rules)


def kernel_ranges(
    shape: GemmShape, ms: Sequence[int], rules: JitRules = KNOWN_RULES[0]
) -> dict[Kernel, MRanges]:
    """Kernels of one GEMM over ascending ``ms``, each with the M that run it."""
    found: dict[Kernel, list[tuple[int, int]]] = {}
    if not ms:
        return {}
    starts = [*rules.m_class_starts(shape.type, ms[-1]), ms[-1] + 1]
    before = None
    for start, end in pairwise(starts):
        low, high = bisect_left(ms, start), bisect_left(ms, end)
        if low == high:
            continue
        for kernel in rules.kernels_of(shape.call(ms[low])):
            ranges = found.setdefault(kernel, [])
            if ranges and ranges[-1][1] == before:
                ranges[-1] = (ranges[-1][0], ms[high - 1])
            else:
                ranges.append((ms[low], ms[high - 1]))
        before = ms[high - 1]
    return {kernel: tuple(ranges) for kernel, ranges in found.items()}


def union(many: Iterable[MRanges]) -> MRanges:
    """Ranges that hold exactly the integers that any of the given ranges holds."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(pair for ranges in many for pair in ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)
