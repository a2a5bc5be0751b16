"""Which kernels a schedule leaves on each node's disk, and which of its requests stall.

Both follow from the operations alone: what a rank uses it compiles or finds, so afterwards its
node has it. No clock is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from runner.kernels.kernel import Kernel
from runner.kernels.table import KernelTable
from runner.kernels.types import KernelCall, expand
from runner.schedule import EXCHANGE, Collective, KernelWork, Mark, Op, Schedule, Walk

STALLS_AFTER = "requests"
"""Phase from which on a compile holds up traffic: the server is up."""


@dataclass(frozen=True, order=True)
class Stall:
    """A kernel that a forward compiles while requests wait.

    Attributes:
        forward: index of the forward among those after the first request.
        name: the forward's mode and tokens.
        node: where it happens.
        kernel: the kernel's identity.
    """

    forward: int
    name: str
    node: int
    kernel: str


def kernels_before(
    schedule: Schedule, table: KernelTable, node_of: Callable[[int], int], phase: str = STALLS_AFTER
) -> dict[int, set[Kernel]]:
    """Kernels on each node's disk when the phase begins, from a cold cache."""
    held: dict[int, set[Kernel]] = {}
    exchanging: set[int] = set()
    for rank, ops in enumerate(schedule.ranks):
        disk = held.setdefault(node_of(rank), set())
        for op in ops:
            if op == Mark("phase", phase):
                break
            disk.update(_used(op, table))
            if isinstance(op, Collective) and op.name == EXCHANGE:
                exchanging.add(node_of(rank))
    everything = set().union(*(held[node] for node in exchanging))
    for node in exchanging:
        held[node] |= everything
    return held


def stalls_of(schedule: Schedule, table: KernelTable, node_of: Callable[[int], int]) -> list[Stall]:
    """Stalls of the requests after the first one, a kernel once on each node."""
    held = kernels_before(schedule, table, node_of)
    found = []
    forwards = [list(_forwards(ops)) for ops in schedule.ranks]
    for index in range(max(map(len, forwards), default=0)):
        for rank, served in enumerate(forwards):
            name, ops = served[index]
            disk = held[node_of(rank)]
            for kernel in (kernel for op in ops for kernel in _used(op, table)):
                if kernel not in disk:
                    disk.add(kernel)
                    found.append(Stall(index, name, node_of(rank), kernel.identity))
    return sorted(found)


def _forwards(ops: Sequence[Op]) -> Iterator[tuple[str, list[Op]]]:
    """Name and operations of each forward of the phase in which stalls count."""
    name, own, inside = "", list[Op](), False
    for op in ops:
        if isinstance(op, Mark) and op.kind == "phase":
            inside = op.name == STALLS_AFTER
        if isinstance(op, Mark) and op.kind in ("phase", "forward"):
            if name:
                yield name, own
            name, own = (op.name if inside and op.kind == "forward" else ""), []
        elif name:
            own.append(op)
    if name:
        yield name, own


def _used(op: Op, table: KernelTable) -> Iterable[Kernel]:
    if isinstance(op, KernelCall):
        return table.kernels_of(op)
    if isinstance(op, Walk):
        return table.kernel_ranges(op.shape, expand(op.steps))
    return op.kernels if isinstance(op, KernelWork) else ()
