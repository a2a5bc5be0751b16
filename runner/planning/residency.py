"""Which kernels are on each node's disk at some point of a run, and which requests stall.

Both follow from the operations alone, without a clock: a rank finds or compiles every kernel that
it uses, so its node has the kernel afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from runner.config.warmup import WarmupPolicy
from runner.kernels.kernel import Kernel
from runner.kernels.table import KernelTable
from runner.kernels.types import DeepGemmKernelType, KernelCall, expand
from runner.planning.plan import plan_of
from runner.scenario import Scenario
from runner.schedule import EXCHANGE, Collective, Forward, KernelWork, Mark, Part, Walk

SERVING = "requests"
"""Phase that begins once the server is up; from then on, a compile delays requests."""


def kernels_at_start(scenario: Scenario) -> frozenset[Kernel]:
    """Kernels on every node's disk before the run: none, or those of the prebuilt cache."""
    if scenario.policy is not WarmupPolicy.PREBUILT:
        return frozenset()
    return frozenset(item.kernel for item in plan_of(scenario).kernels)


def kernels_once_up(
    ranks: Sequence[Sequence[Part]],
    table: KernelTable,
    node_of: Callable[[int], int],
    at_start: frozenset[Kernel] = frozenset(),
    without: Collection[DeepGemmKernelType] = (),
) -> dict[int, frozenset[Kernel]]:
    """Kernels on each node's disk once the server is up: warmed up, first request answered.

    Args:
        ranks: what each rank runs.
        table: the kernels of each call.
        node_of: gives a rank's node.
        at_start: kernels on every disk before the run.
        without: types of GEMMs that the server does not use DeepGEMM for.
    """
    disks: dict[int, set[Kernel]] = {}
    exchanging: set[int] = set()
    for rank, parts in enumerate(ranks):
        disk = disks.setdefault(node_of(rank), set(at_start))
        for part in parts:
            if part == Mark("phase", SERVING):
                break
            disk.update(_used(part, table, without))
            if isinstance(part, Collective) and part.name == EXCHANGE:
                exchanging.add(node_of(rank))
    everything = set[Kernel]().union(*(disks[node] for node in exchanging))
    return {
        node: frozenset(disk | everything if node in exchanging else disk)
        for node, disk in disks.items()
    }


@dataclass(frozen=True, order=True)
class Stall:
    """A kernel that a forward compiles while requests wait.

    Attributes:
        forward: index of the forward among those after the first request.
        name: the forward's mode and number of tokens.
        node: the node where it stalls.
        kernel: the kernel's identity.
    """

    forward: int
    name: str
    node: int
    kernel: str


def stalls_of(
    ranks: Sequence[Sequence[Part]],
    table: KernelTable,
    node_of: Callable[[int], int],
    at_start: frozenset[Kernel] = frozenset(),
    without: Collection[DeepGemmKernelType] = (),
) -> list[Stall]:
    """Stalls of the requests after the first one, at most one per kernel and node.

    See :func:`kernels_once_up` for the arguments.
    """
    up = kernels_once_up(ranks, table, node_of, at_start, without)
    disks = {node: set(held) for node, held in up.items()}
    found = []
    # Ranks may serve different numbers of forwards.
    served = zip_longest(*map(_served_forwards, ranks), fillvalue=("", ()))
    for index, forwards in enumerate(served):
        for rank, (name, parts) in enumerate(forwards):
            node = node_of(rank)
            for kernel in (kernel for part in parts for kernel in _used(part, table, without)):
                if kernel not in disks[node]:
                    disks[node].add(kernel)
                    found.append(Stall(index, name, node, kernel.identity))
    return sorted(found)


def _served_forwards(parts: Sequence[Part]) -> list[tuple[str, list[Part]]]:
    """Name and parts of each forward that serves a request after the first one."""
    found: list[tuple[str, list[Part]]] = []
    serving = False
    for part in parts:
        mark = part.ops[0] if isinstance(part, Forward) else part
        if isinstance(mark, Mark) and mark.kind == "phase":
            serving = mark.name == SERVING
        elif serving and isinstance(mark, Mark) and mark.kind == "forward":
            found.append((mark.name, []))
        if serving and found:
            found[-1][1].append(part)
    return found


def _used(
    part: Part, table: KernelTable, without: Collection[DeepGemmKernelType]
) -> Iterable[Kernel]:
    """Kernels that a part leaves on the node's disk, ordered by first use."""
    if isinstance(part, Forward):
        calls = (call for _, call in part.calls if call.type not in without)
        return chain.from_iterable(map(table.kernels_of, calls))
    if isinstance(part, KernelCall):
        return () if part.type in without else table.kernels_of(part)
    if isinstance(part, Walk):
        if part.shape.type in without:
            return ()
        return table.kernel_ranges(part.shape, expand(part.steps))
    return part.kernels if isinstance(part, KernelWork) else ()
