"""Compare two kernel tables and describe every difference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from runner.kernels.describe import config_of, in_words
from runner.kernels.kernel import Kernel
from runner.kernels.table import Demand, KernelTable, MRanges

_SHOWN = 3


def differences(demands: Iterable[Demand], ours: KernelTable, theirs: KernelTable) -> list[str]:
    """One line for each kernel of a GEMM that only one table has, or that runs for other M.

    Raises:
        UserError: a table does not know a GEMM.
    """
    return [line for demand in demands for line in _of_gemm(demand, ours, theirs)]


def _of_gemm(demand: Demand, ours: KernelTable, theirs: KernelTable) -> Iterator[str]:
    name = f"{demand.shape.describe()} on {demand.shape.num_sms} SMs"
    mine, other = (table.kernel_ranges(demand.shape, demand.ms) for table in (ours, theirs))
    for kernel in dict.fromkeys([*mine, *other]):
        if kernel not in other:
            yield f"{name}: M {_ranges(mine[kernel])} would run {_words(kernel)}, but none does"
        elif kernel not in mine:
            yield f"{name}: M {_ranges(other[kernel])} run {_words(kernel)}, which no rule gives"
        elif mine[kernel] != other[kernel]:
            yield (
                f"{name}: {_words(kernel)} is run by M {_ranges(other[kernel])}, not "
                f"{_ranges(mine[kernel])}"
            )


def _words(kernel: Kernel) -> str:
    return f"{kernel.name} ({in_words(config_of(kernel)) or kernel.identity})"


def _ranges(ranges: MRanges) -> str:
    pairs = [f"{first}..{last}" if first < last else f"{first}" for first, last in ranges[:_SHOWN]]
    return ", ".join(pairs) + (", ..." if len(ranges) > _SHOWN else "")
