"""A plan and its coverage as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from runner.kernels.kernel import Kernel
from runner.kernels.table import MRanges
from runner.kernels.types import DeepGemmKernelType
from runner.planning.coverage import Coverage
from runner.planning.plan import Plan, PlannedKernel
from runner.planning.residency import Stall
from runner.report.console import make_console

_SHOWN_RANGES = 6


@dataclass(frozen=True)
class Machine:
    """What compiling would cost somewhere, all estimates.

    Attributes:
        name: the machine's.
        cores: its CPU cores.
        seconds_of: one nvcc process for a kernel.
        build_seconds: all planned kernels by ``runner compile``.
    """

    name: str
    cores: int
    seconds_of: Callable[[Kernel], float]
    build_seconds: float


def print_plan(plan: Plan, machine: Machine, *, pp: int) -> None:
    """Kernels per type, who shares them, and what compiling them costs."""
    console = make_console()
    console.print(_table(plan, machine.seconds_of))
    total = seconds_one_by_one(plan, machine.seconds_of)
    console.print(
        f"{len(plan.kernels)} distinct kernels for {len(plan.demands)} GEMM shapes"
        + _sharing(plan, pp)
    )
    console.print(
        f"compiled one by one {total:.0f} s, by runner compile on {machine.cores} cores "
        f"{machine.build_seconds:.0f} s (estimates for {machine.name})"
    )


def seconds_one_by_one(plan: Plan, seconds_of: Callable[[Kernel], float]) -> float:
    """Seconds to compile every planned kernel, one after the other."""
    return sum(seconds_of(item.kernel) for item in plan.kernels)


def _sharing(plan: Plan, pp: int) -> str:
    if pp == 1:
        return ""
    needs = [sum(stage in item.stages for item in plan.kernels) for stage in range(pp)]
    return f"; by stage {', '.join(map(str, needs))}, unshared {sum(needs)}"


def _table(plan: Plan, seconds_of: Callable[[Kernel], float]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("type")
    for name in ("GEMMs", "M up to", "kernels", "compile s"):
        table.add_column(name, justify="right")
    for name, items in _groups(plan).items():
        shapes = {use.shape for item in items for use in item.uses}
        table.add_row(
            name,
            str(len(shapes)),
            str(max(last for item in items for _, last in item.m_ranges)),
            str(len(items)),
            f"{sum(seconds_of(item.kernel) for item in items):.0f}",
        )
    return table


def _groups(plan: Plan) -> dict[str, list[PlannedKernel]]:
    """Kernels by the type that needs them first; layout transposes apart."""
    groups: dict[str, list[PlannedKernel]] = {}
    for item in plan.kernels:
        transpose = item.kernel.name == "transpose_fp32"
        name = "layout transposes" if transpose else item.uses[0].shape.type.name.lower()
        groups.setdefault(name, []).append(item)
    return groups


def print_coverage(covered: Coverage, plan: Plan) -> None:
    """What a policy compiles, and the M that would still stall a request."""
    console = make_console()
    planned = len(plan.kernels)
    extra = f", and {covered.superfluous} that nothing needs" if covered.superfluous else ""
    console.print(
        f"\n{covered.policy.value}: compiles {planned - covered.missing} of {planned} planned "
        f"kernels until the first request is answered{extra}"
    )
    if not covered.uncovered:
        console.print("covered: no token count up to the limit compiles anything afterwards")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("uncovered GEMM")
    table.add_column("num_sms", justify="right")
    table.add_column("M that would stall")
    for use in _gathered(covered):
        table.add_row(*use)
    console.print(table)


def print_stalls(stalls: Sequence[Stall]) -> None:
    """What a stream of requests would compile, a row for each forward and node that stalls."""
    rows: dict[tuple[int, str, int], list[str]] = {}
    for stall in stalls:
        rows.setdefault((stall.forward, stall.name, stall.node), []).append(stall.kernel)
    if not rows:
        return
    table = Table(box=None, pad_edge=False)
    for name in ("forward that stalls", "node", "kernels it compiles"):
        table.add_column(name)
    for (_, name, node), kernels in rows.items():
        names = Counter(kernel.rpartition(" ")[0] for kernel in kernels)
        words = ", ".join(f"{count} {kind}" for kind, count in names.items())
        table.add_row(name, str(node), words)
    console = make_console()
    console.print()
    console.print(table)


def _gathered(covered: Coverage) -> list[tuple[str, str, str]]:
    """One row a GEMM; numbers of splits of one hyper-connection GEMM together."""
    rows: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for use in covered.uncovered:
        shape = use.shape
        name = shape.describe()
        if shape.type is DeepGemmKernelType.TF32_HC_PRENORM_GEMM:
            name = f"{shape.type.name.lower()}:{shape.n}:{shape.k}"
        rows.setdefault((name, str(shape.num_sms)), []).extend(use.m_ranges)
    return [(name, sms, ranges_text(sorted(pairs))) for (name, sms), pairs in rows.items()]


def ranges_text(m_ranges: MRanges | Sequence[tuple[int, int]], shown: int = _SHOWN_RANGES) -> str:
    """``1..16, 33`` and so on; many ranges are cut short with their number."""
    words = [str(a) if a == b else f"{a}..{b}" for a, b in m_ranges]
    if len(words) <= shown:
        return ", ".join(words)
    return f"{', '.join(words[:shown])} and {len(words) - shown} more, up to {m_ranges[-1][1]}"


def coverage_line(nodes: Sequence[dict[str, Any]], max_tokens: int) -> str:
    """One line for all nodes' proofs: the least that any of them holds."""
    planned = max(node["planned"] for node in nodes)
    least = min(node["present"] for node in nodes)
    held = f"{least} of {planned} kernels covered, forwards of up to {max_tokens} tokens"
    gemms = max(len(node["stalls"]) for node in nodes)
    return f"{held}: {f'{gemms} GEMMs can still stall' if gemms else 'none can stall'}"
