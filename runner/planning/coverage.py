"""What a warm-up policy compiles of a plan, and what it leaves to stall a request."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from runner.config.parallel import ParallelConfig
from runner.driver.warmup import PLANNING_POLICIES, WarmupOptions, WarmupPolicy
from runner.kernels.kernel import Kernel
from runner.kernels.rules import RULES
from runner.kernels.source import KernelSource
from runner.kernels.table import union
from runner.planning.demands import Deployment
from runner.planning.plan import KernelUse, Plan
from runner.planning.plan_json import use_to_json
from runner.planning.residency import Stall, kernels_before, stalls_of
from runner.scenario import Scenario, record
from runner.schedule import Schedule


@dataclass(frozen=True)
class Coverage:
    """A policy against a plan, once the server is up: warmed up, first request answered.

    Attributes:
        policy: the policy.
        compiled: kernels that it compiles on any node.
        uncovered: M of each GEMM that would stall afterwards on some node.
        missing: planned kernels that a node which needs them lacks.
        superfluous: kernels that it compiles and no forward needs.
        stalls: what a stream of requests would compile, in order.
    """

    policy: WarmupPolicy
    compiled: frozenset[Kernel]
    uncovered: tuple[KernelUse, ...]
    missing: int
    superfluous: int
    stalls: tuple[Stall, ...] = ()


def coverage(
    policy: WarmupPolicy,
    deployment: Deployment,
    plan: Plan,
    *,
    nodes: int | None = None,
    stream: tuple[int, ...] = (),
    walk_max_m: int | None = None,
    walk_memory: float | None = None,
    graph_batch_sizes: tuple[int, ...] = (),
    source: KernelSource = RULES,
) -> Coverage:
    """What the policy leaves uncovered, from cold caches.

    Args:
        policy: the policy.
        deployment: what is served.
        plan: its plan.
        nodes: nodes that the ranks are on, each with a cache; None is one for each stage.
        stream: token counts of requests whose stalls are wanted.
        walk_max_m: see :class:`runner.driver.warmup.WarmupOptions`.
        walk_memory: see :class:`runner.scenario.Scenario`.
        graph_batch_sizes: batch sizes that a CUDA graph is captured for after the warm-up.
        source: gives the kernels; the one that the plan was made with.

    Raises:
        UserError: the nodes do not fit the ranks, or a token count is not planned for.
    """
    parallel = replace(deployment.parallel, nodes=nodes or deployment.parallel.pp)
    scenario = Scenario(
        model=deployment.model,
        parallel=parallel,
        num_sms=deployment.num_sms,
        warmup=WarmupOptions(
            policy=policy,
            disaggregation=deployment.disaggregation,
            walk_max_m=walk_max_m,
            graph_batch_sizes=graph_batch_sizes,
        ),
        bf16_fp32_algo=deployment.bf16_fp32_algo,
        max_tokens=deployment.max_tokens,
        stream=stream,
        walk_memory=walk_memory,
        source=source,
    )
    schedule = record(scenario)
    held = _held(scenario, schedule, plan)
    planned = {item.kernel for item in plan.kernels}
    compiled = frozenset[Kernel]().union(*held.values())
    names = {kernel.identity for kernel in planned}
    gaps, missing = _gaps(plan, parallel, held)
    return Coverage(
        policy,
        compiled,
        tuple(gaps),
        missing=missing,
        superfluous=0 if deployment.without else len(compiled - planned),
        stalls=tuple(
            stall
            for stall in stalls_of(schedule, scenario.table, parallel.node_of)
            if stall.kernel in names
        ),
    )


def _held(scenario: Scenario, schedule: Schedule, plan: Plan) -> dict[int, frozenset[Kernel]]:
    """Kernels on each node's disk once the server is up."""
    if scenario.warmup.policy in PLANNING_POLICIES:
        everything = frozenset(item.kernel for item in plan.kernels)
        return dict.fromkeys(range(scenario.parallel.nodes), everything)
    found = kernels_before(schedule, scenario.table, scenario.parallel.node_of)
    return {node: frozenset(kernels) for node, kernels in found.items()}


def _gaps(
    plan: Plan, parallel: ParallelConfig, held: dict[int, frozenset[Kernel]]
) -> tuple[list[KernelUse], int]:
    """Uncovered M of each GEMM over all nodes, and how many kernels some node lacks."""
    uses: dict[Any, list[KernelUse]] = {}
    lacking: set[Kernel] = set()
    for stages, kernels in {(node_stages(parallel, node), held[node]) for node in held}:
        lacking.update(item.kernel for item in plan.needed_by(stages) if item.kernel not in kernels)
        for use in plan.uncovered(kernels, stages):
            uses.setdefault(use.shape, []).append(use)
    gaps = [
        KernelUse(demand.shape, union(use.m_ranges for use in uses[demand.shape]), demand.stages)
        for demand in plan.demands
        if demand.shape in uses
    ]
    return gaps, len(lacking)


def node_stages(parallel: ParallelConfig, node: int) -> tuple[int, ...]:
    """Pipeline stages that have ranks on a node."""
    first = node * parallel.ranks_per_node
    ranks = range(first, first + parallel.ranks_per_node)
    return tuple(sorted({parallel.coordinates(rank).pp_rank for rank in ranks}))


def node_coverage(
    node: int, parallel: ParallelConfig, plan: Plan, present: Collection[Kernel]
) -> dict[str, Any]:
    """A node's proof of coverage as plain data.

    It tells how many of the kernels that the node's stages can need its cache holds, and the M of
    each GEMM that would compile.
    """
    stages = node_stages(parallel, node)
    needed = plan.needed_by(stages)
    return {
        "node": node,
        "planned": len(needed),
        "present": sum(item.kernel in present for item in needed),
        "stalls": [use_to_json(use) for use in plan.uncovered(present, stages)],
    }
