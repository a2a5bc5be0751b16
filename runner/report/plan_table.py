"""Print a plan and its coverage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from runner.kernels.call_template import CallShape
from runner.kernels.kernel import Kernel
from runner.kernels.table import Shape
from runner.kernels.types import DeepGemmKernelType, GemmShape
from runner.planning.coverage import Coverage
from runner.planning.plan import Plan, PlannedKernel
from runner.planning.residency import Stall
from runner.report.console import counted, make_console

_SHOWN_RANGES = 6


@dataclass(frozen=True)
class Machine:
    """Estimated cost of compiling on a machine."""

    name: str
    cores: int
    seconds_of: Callable[[Kernel], float]  # for one nvcc process
    build_seconds: float  # for ``runner compile`` with all planned kernels


def print_plan(plan: Plan, machine: Machine, *, pp: int) -> None:
    """Print the kernels of each type, how stages share them, and the cost of compiling them."""
    console = make_console()
    groups: dict[str, list[PlannedKernel]] = {}
    for item in plan.kernels:
        transpose = item.kernel.name == "transpose_fp32"
        name = "layout transposes" if transpose else _type_name(item.uses[0].shape)
        groups.setdefault(name, []).append(item)
    table = _table("type", right=("GEMMs", "M up to", "kernels", "compile s"))
    for name, items in groups.items():
        table.add_row(
            name,
            str(len({use.shape for item in items for use in item.uses})),
            str(max(last for item in items for _, last in item.m_ranges)),
            str(len(items)),
            f"{sum(machine.seconds_of(item.kernel) for item in items):.0f}",
        )
    console.print(table)
    shapes = counted(len(plan.demands), "GEMM shape")
    counts = f"{counted(len(plan.kernels), 'distinct kernel')} for {shapes}"
    if pp > 1:
        needs = [sum(stage in item.stages for item in plan.kernels) for stage in range(pp)]
        counts += f"; by stage {', '.join(map(str, needs))}, unshared {sum(needs)}"
    console.print(counts)
    total = sum(machine.seconds_of(item.kernel) for item in plan.kernels)
    console.print(
        f"compiled one by one {total:.0f} s, by runner compile on {machine.cores} cores "
        f"{machine.build_seconds:.0f} s (estimates for {machine.name})"
    )


def _type_name(shape: Shape) -> str:
    """A GEMM's type; a recorded call's function."""
    if isinstance(shape, CallShape):
        return shape.template.function
    return shape.type.name.lower()


def _table(*left: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def print_coverage(covered: Coverage, plan: Plan) -> None:
    """Print what a policy compiles, and the M that would still stall a request."""
    console = make_console()
    planned = len(plan.kernels)
    extra = f", and {covered.superfluous} that nothing needs" if covered.superfluous else ""
    console.print(
        f"\n{covered.policy.value}: compiles {planned - covered.missing} of {planned} planned "
        f"kernels until the first request is answered{extra}"
    )
    if not covered.uncovered:
        console.print("covered: no planned token count compiles anything afterwards")
        return
    # One row per GEMM; split counts of one hyper-connection GEMM share a row.
    rows: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for use in covered.uncovered:
        shape = use.shape
        name = shape.describe()
        hyper = DeepGemmKernelType.TF32_HC_PRENORM_GEMM
        if isinstance(shape, GemmShape) and shape.type is hyper:
            name = f"{shape.type.name.lower()}:{shape.n}:{shape.k}"
        rows.setdefault((name, str(shape.num_sms)), []).extend(use.m_ranges)
    table = _table("uncovered GEMM", right=["num_sms"])
    table.add_column("M that would stall")
    for (name, sms), pairs in rows.items():
        table.add_row(name, sms, _ranges_text(sorted(pairs)))
    console.print(table)


def print_stalls(stalls: Sequence[Stall]) -> None:
    """Print what a stream of requests would compile, one row per forward and node."""
    rows: dict[tuple[int, str, int], list[str]] = {}
    for stall in stalls:
        rows.setdefault((stall.forward, stall.name, stall.node), []).append(stall.kernel)
    if not rows:
        return
    table = _table("forward that stalls", "node", "kernels it compiles")
    for (_, name, node), kernels in rows.items():
        names = Counter(kernel.rpartition(" ")[0] for kernel in kernels)
        words = ", ".join(f"{count} {kind}" for kind, count in names.items())
        table.add_row(name, str(node), words)
    console = make_console()
    console.print()
    console.print(table)


def _ranges_text(m_ranges: Sequence[tuple[int, int]]) -> str:
    """``1..16, 33`` and so on; a long list is cut short and ends with the number left out."""
    words = [str(a) if a == b else f"{a}..{b}" for a, b in m_ranges]
    if len(words) <= _SHOWN_RANGES:
        return ", ".join(words)
    more = f"{len(words) - _SHOWN_RANGES} more, up to {m_ranges[-1][1]}"
    return f"{', '.join(words[:_SHOWN_RANGES])} and {more}"


def coverage_line(nodes: Sequence[Mapping[str, Any]], max_tokens: int) -> str:
    """The coverage of all nodes on one line: that of the node that lacks the most kernels."""
    worst = max(nodes, key=lambda node: int(node["planned"]) - int(node["present"]))
    held = f"{worst['present']} of {worst['planned']} kernels covered"
    gemms = max(len(node["stalls"]) for node in nodes)
    stalls = f"{gemms} GEMMs can still stall" if gemms else "none can stall"
    return f"{held}, forwards of up to {max_tokens} tokens: {stalls}"
