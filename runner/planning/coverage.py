"""Which planned kernels a warm-up policy compiles, and which it leaves to stall a request."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from runner.config.parallel import ParallelConfig
from runner.config.warmup import WarmupPolicy
from runner.kernels.kernel import Kernel
from runner.kernels.table import Shape, union
from runner.planning.plan import KernelUse, Plan, plan_of, table_of, use_to_json
from runner.planning.residency import Stall, kernels_at_start, kernels_once_up, stalls_of
from runner.scenario import Scenario
from runner.schedule import Part


@dataclass(frozen=True)
class Coverage:
    """How much of a plan a policy covers once the server is up: warmed up, first request answered.

    Attributes:
        policy: the policy.
        compiled: kernels that the policy compiles on any node.
        uncovered: M of each GEMM that would stall later on some node.
        missing: planned kernels missing on a node that needs them.
        superfluous: kernels that the policy compiles but no forward needs.
        stalls: kernels that the requests after the first would compile, in order.
    """

    policy: WarmupPolicy
    compiled: frozenset[Kernel]
    uncovered: tuple[KernelUse, ...]
    missing: int
    superfluous: int
    stalls: tuple[Stall, ...] = ()


def coverage(scenario: Scenario, ranks: Sequence[Sequence[Part]]) -> Coverage:
    """Coverage of the scenario's plan by its policy, starting from cold caches.

    Args:
        scenario: the scenario.
        ranks: what each rank runs, from :func:`runner.driver.run.record_parts`.

    Raises:
        UserError: the source does not know all kernels.
    """
    plan = plan_of(scenario)
    table, node_of = table_of(scenario), scenario.parallel.node_of
    at_start = kernels_at_start(scenario)
    disks = kernels_once_up(ranks, table, node_of, at_start, scenario.without)
    planned = {item.kernel for item in plan.kernels}
    compiled = frozenset[Kernel]().union(*disks.values())
    return Coverage(
        policy=scenario.policy,
        compiled=compiled,
        uncovered=_uncovered(plan, scenario.parallel, disks),
        missing=len(missing_kernels(scenario, disks)),
        superfluous=len(compiled - planned),
        stalls=tuple(stalls_of(ranks, table, node_of, at_start, scenario.without)),
    )


def _uncovered(
    plan: Plan, parallel: ParallelConfig, disks: Mapping[int, frozenset[Kernel]]
) -> tuple[KernelUse, ...]:
    """Uncovered M of each GEMM over all nodes."""
    uses: dict[Shape, list[KernelUse]] = {}
    for stages, disk in {(node_stages(parallel, node), disk) for node, disk in disks.items()}:
        for use in plan.uncovered(disk, stages):
            uses.setdefault(use.shape, []).append(use)
    return tuple(
        KernelUse(demand.shape, union(use.m_ranges for use in uses[demand.shape]), demand.stages)
        for demand in plan.demands
        if demand.shape in uses
    )


def missing_kernels(scenario: Scenario, disks: Mapping[int, frozenset[Kernel]]) -> set[Kernel]:
    """Planned kernels missing on some node that can need them."""
    plan, parallel = plan_of(scenario), scenario.parallel
    return {
        item.kernel
        for stages, disk in {(node_stages(parallel, node), disk) for node, disk in disks.items()}
        for item in plan.needed_by(stages)
        if item.kernel not in disk
    }


def node_stages(parallel: ParallelConfig, node: int) -> tuple[int, ...]:
    """Pipeline stages that have ranks on a node."""
    first = node * parallel.ranks_per_node
    ranks = range(first, first + parallel.ranks_per_node)
    return tuple(sorted({parallel.coordinates(rank).pp_rank for rank in ranks}))


def node_coverage(scenario: Scenario, node: int, present: Collection[Kernel]) -> dict[str, object]:
    """A node's coverage as plain data.

    It counts the kernels that the node's stages can need, and those of them in its cache. Its
    ``stalls`` are the M of each GEMM that would still compile.
    """
    plan, stages = plan_of(scenario), node_stages(scenario.parallel, node)
    needed = plan.needed_by(stages)
    return {
        "node": node,
        "planned": len(needed),
        "present": sum(item.kernel in present for item in needed),
        "stalls": [use_to_json(use) for use in plan.uncovered(present, stages)],
    }


def nodes_coverage(
    scenario: Scenario, disks: Mapping[int, frozenset[Kernel]]
) -> list[dict[str, object]]:
    """:func:`node_coverage` of every node, given the kernels on each node's disk.

    Nodes with the same stages and the same disk share one result.
    """
    known: dict[object, dict[str, object]] = {}
    found = []
    for node, disk in sorted(disks.items()):
        key = (node_stages(scenario.parallel, node), disk)
        if key not in known:
            known[key] = node_coverage(scenario, node, disk)
        found.append({**known[key], "node": node})
    return found
