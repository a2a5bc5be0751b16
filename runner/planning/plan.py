"""The plan: the exact set of kernels that any M of given GEMMs can need."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from runner.kernels.kernel import Kernel
from runner.kernels.table import Demand, KernelTable, MRanges, union
from runner.kernels.types import GemmShape


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
    table: KernelTable

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


def make_plan(demands: Iterable[Demand], table: KernelTable) -> Plan:
    """Plan all demands; kernels that several share are one.

    Raises:
        UserError: a GEMM that the table does not know.
    """
    given = tuple(demands)
    uses: dict[Kernel, list[KernelUse]] = {}
    for demand in given:
        for kernel, m_ranges in table.kernel_ranges(demand.shape, demand.ms).items():
            uses.setdefault(kernel, []).append(KernelUse(demand.shape, m_ranges, demand.stages))
    kernels = tuple(PlannedKernel(kernel, tuple(found)) for kernel, found in uses.items())
    return Plan(kernels, given, table)
