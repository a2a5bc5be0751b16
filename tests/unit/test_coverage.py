"""Coverage: which planned kernels a policy leaves uncompiled, against brute force over M."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from runner.backend.gemm_walks import GIB
from runner.config.hf import with_layers
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV4, DSV4_TINY
from runner.config.warmup import DisaggregationMode, WarmupPolicy
from runner.driver.run import record, record_parts, record_rank
from runner.errors import UserError
from runner.kernels.kernel import Kernel
from runner.kernels.rules import kernels_of
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import KernelCall
from runner.model.strategy import COMM_SMS, STRATEGIES
from runner.planning import coverage as planning
from runner.planning.coverage import Coverage, node_coverage, node_stages
from runner.planning.plan import Plan, plan_of, table_of
from runner.planning.residency import SERVING, kernels_once_up
from runner.scenario import Scenario
from runner.schedule import KernelWork, Mark, Op, Walk, flatten

P = WarmupPolicy
POLICIES = pytest.mark.parametrize("policy", WarmupPolicy, ids=lambda policy: policy.value)
LIMIT = 48


@cache
def tiny(nodes: int = 2, **values: Any) -> Scenario:
    parallel = ParallelConfig(pp=2, tp=2, nodes=nodes)
    return Scenario(
        model=DSV4_TINY, parallel=parallel, **{"max_tokens": LIMIT, "stream": (), **values}
    )


def coverage(scenario: Scenario) -> Coverage:
    return planning.coverage(scenario, record_parts(scenario))


def held_up(one: Scenario) -> dict[int, set[Kernel]]:
    """Kernels each node holds before further requests, from every single operation."""
    nodes = range(one.parallel.nodes)
    if one.policy in (P.PLANNED, P.PREBUILT):
        return {node: {item.kernel for item in plan_of(one).kernels} for node in nodes}
    held: dict[int, set[Kernel]] = {node: set() for node in nodes}
    for rank, ops in enumerate(record(replace(one, stream=None)).ranks):
        for op in ops[: ops.index(Mark("phase", SERVING))]:
            held[one.parallel.node_of(rank)].update(used(op))
    return held


def used(op: Op) -> list[Kernel]:
    if isinstance(op, Walk):
        first, last = op.steps[0][0], op.steps[-1][1]
        ms = [m for a, b, step in op.steps for m in range(a, b + 1, step)]
        assert (ms[0], ms[-1]) == (first, last)
        return [kernel for m in ms for kernel in kernels_of(op.shape.call(m))]
    if isinstance(op, KernelCall):
        return list(kernels_of(op))
    return list(op.kernels) if isinstance(op, KernelWork) else []


def brute_force(
    parallel: ParallelConfig, plan: Plan, held: dict[int, set[Kernel]]
) -> tuple[dict[Any, set[int]], set[Kernel]]:
    """The M of each GEMM that would compile on some node, and the missing kernels."""
    stalling: dict[Any, set[int]] = {}
    lacking: set[Kernel] = set()
    for node, kernels in held.items():
        stages = set(node_stages(parallel, node))
        for demand in plan.demands:
            if stages.isdisjoint(demand.stages):
                continue
            for m in demand.ms:
                missing = [k for k in kernels_of(demand.shape.call(m)) if k not in kernels]
                lacking.update(missing)
                if missing:
                    stalling.setdefault(demand.shape, set()).add(m)
    return stalling, lacking


@POLICIES
@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_coverage_equals_brute_force_over_every_m(policy: WarmupPolicy, nodes: int) -> None:
    one = tiny(nodes=nodes, policy=policy, walk_max_m=LIMIT)
    plan, found = plan_of(one), coverage(one)
    held = held_up(one)
    stalling, lacking = brute_force(one.parallel, plan, held)
    planned = {item.kernel for item in plan.kernels}
    compiled = set().union(*held.values())
    assert (found.policy, found.compiled) == (policy, compiled)
    assert (found.missing, found.superfluous) == (len(lacking), len(compiled - planned))
    # Ranges may include M that no forward has, where the neighbours run the same kernel.
    ms = {demand.shape: set(demand.ms) for demand in plan.demands}
    told = {
        use.shape: {m for first, last in use.m_ranges for m in range(first, last + 1)}
        & ms[use.shape]
        for use in found.uncovered
    }
    assert told == stalling
    assert found.stalls == ()


def test_stalls_are_counted_per_node() -> None:
    for nodes, expected in ((1, {0}), (2, {0, 1})):
        found = coverage(tiny(nodes=nodes, stream=(LIMIT,)))
        assert {stall.node for stall in found.stalls} == expected


@POLICIES
def test_stalls_of_a_stream_are_missing_planned_kernels(policy: WarmupPolicy) -> None:
    made = tiny(policy=policy, stream=(7, LIMIT, 3, 7))
    plan, found = plan_of(made), coverage(made)
    assert {stall.forward for stall in found.stalls} <= set(range(8))
    planned = {item.kernel.identity for item in plan.kernels}
    if not policy.walked:
        assert {stall.kernel for stall in found.stalls} <= planned
    assert (found.stalls == ()) == (policy in (P.PLANNED, P.PREBUILT))
    # A stream with every M stalls on every missing kernel.
    if policy is P.NONE:
        every = coverage(replace(made, stream=tuple(range(1, LIMIT + 1))))
        pairs = {(stall.node, stall.kernel) for stall in every.stalls}
        assert len({kernel for _, kernel in pairs}) == found.missing


def test_forwards_outside_the_plan_are_reported_as_stalls() -> None:
    made = tiny(
        disaggregation=DisaggregationMode.DECODE,
        decode_batch_sizes=(1,),
        batch_sizes=(1,),
        stream=(LIMIT,),
    )
    planned = {item.kernel.identity for item in plan_of(made).kernels}
    assert {stall.kernel for stall in coverage(made).stalls} - planned


def test_graph_capture_covers_kernels_of_its_decode_steps() -> None:
    one = tiny(graph_batch_sizes=(1, LIMIT))
    plain, captured = coverage(tiny()), coverage(one)
    assert plain.compiled < captured.compiled
    before = kernels_once_up(record(one).ranks, table_of(one), one.parallel.node_of)
    assert captured.compiled == frozenset[Kernel]().union(*before.values())


def test_warm_up_with_overlap_compiles_kernels_of_half_batches() -> None:
    made = Scenario(
        model=with_layers(DSV4, 3),
        parallel=ParallelConfig(pp=3, tp=2, ep=True, moe_a2a=True, nodes=3),
        overlap=(STRATEGIES["deepseek-prefill"],),
        max_tokens=8448,
        policy=P.PP_PARALLEL,
        stream=(),
    )
    found = coverage(made)
    called = {
        kernel
        for ops in record(made).ranks
        for op in ops
        if isinstance(op, KernelCall) and op.num_sms == 132 - COMM_SMS
        for kernel in kernels_of(op)
    }
    assert called and called <= found.compiled
    assert not called <= coverage(replace(made, overlap=())).compiled


def test_walk_memory_limit_reduces_coverage() -> None:
    """With 256 experts, a walk of a masked GEMM needs memory for 256 M rows."""
    made = few_layers(pp=5, tp=2, max_tokens=4096, policy=P.FULL)
    much, little = (coverage(replace(made, walk_memory=gib * GIB)) for gib in (100.0, 1.0))
    assert much.missing < little.missing
    assert little.compiled < much.compiled


def test_stream_above_max_tokens_is_refused() -> None:
    with pytest.raises(UserError, match=f"token count {LIMIT + 1} is above --max-tokens {LIMIT}"):
        tiny(policy=P.PLANNED, stream=(LIMIT + 1,))


def test_kernels_excluded_from_the_plan_are_not_superfluous() -> None:
    made = tiny(policy=P.FULL)
    assert coverage(made).superfluous > 0
    fewer = coverage(replace(made, without=(T.PAGED_MQA_LOGITS_METADATA,)))
    assert fewer.superfluous == coverage(made).superfluous


# -- dsv4 -----------------------------------------------------------------------------------------


def few_layers(max_tokens: int, policy: WarmupPolicy = P.NONE, **layout: int) -> Scenario:
    return Scenario(
        model=with_layers(DSV4, 5),
        parallel=ParallelConfig(nodes=layout["pp"], **layout),
        max_tokens=max_tokens,
        policy=policy,
        stream=(),
    )


def test_coverage_of_each_policy_on_dsv4() -> None:
    made = few_layers(pp=5, tp=2, max_tokens=4096)
    plan = plan_of(made)
    found: dict[WarmupPolicy, Coverage] = {p: coverage(replace(made, policy=p)) for p in P}
    everything = len(plan.kernels)
    none = found[P.NONE]
    # Only the first request of one token has compiled: five stages on five nodes.
    assert none.superfluous == 0 and none.missing < everything
    assert len(none.compiled) == len(first_request_kernels(made))
    for policy in (P.PLANNED, P.PREBUILT):
        assert (found[policy].missing, found[policy].superfluous) == (0, 0)
        assert found[policy].uncovered == ()
    full = found[P.FULL]
    # The first request compiles the logits' single kernel; these types have several.
    assert {use.shape.type for use in full.uncovered} == {
        T.PAGED_MQA_LOGITS_METADATA,
        T.FP8_EINSUM_BHR_HDR_BHD,
    }
    # The full list always goes up to 16384, beyond what any forward needs.
    assert full.superfluous > 0
    assert found[P.FAST].missing >= full.missing
    relax = {use.shape.type for use in found[P.RELAX].uncovered}
    assert T.GEMM_NT_BF16BF16F32 in relax and T.GROUPED_GEMM_NT_F8F8BF16_CONTIG not in relax
    parallel = found[P.PP_PARALLEL]
    assert 0 < parallel.missing < none.missing
    assert none.compiled < parallel.compiled


def first_request_kernels(made: Scenario) -> set[Kernel]:
    one = replace(made, batch_sizes=(1,))
    return {
        kernel
        for rank in range(made.parallel.world_size)
        for op in flatten(record_rank(one, rank))
        for kernel in used(op)
    }


def test_pp_parallel_equals_none_with_a_single_stage() -> None:
    made = few_layers(pp=1, tp=2, max_tokens=256)
    none, parallel = (coverage(replace(made, policy=each)) for each in (P.NONE, P.PP_PARALLEL))
    assert parallel.compiled == none.compiled == first_request_kernels(made)
    assert parallel.uncovered == none.uncovered


# -- nodes ----------------------------------------------------------------------------------------


def test_node_stages_lists_the_stages_of_each_node() -> None:
    def stages(nodes: int, **layout: int) -> list[tuple[int, ...]]:
        parallel = ParallelConfig(nodes=nodes, **layout)
        return [node_stages(parallel, node) for node in range(nodes)]

    assert stages(1, pp=3, tp=2) == [(0, 1, 2)]
    assert stages(3, pp=3, tp=2) == [(0,), (1,), (2,)]
    assert stages(6, pp=3, tp=2) == [(0,), (0,), (1,), (1,), (2,), (2,)]
    assert stages(2, pp=3, tp=2) == [(0, 1), (1, 2)]
    assert stages(2, pp=2, tp=1, replicas=2) == [(0, 1), (0, 1)]


def test_node_coverage_lists_what_would_compile() -> None:
    made = tiny()
    plan = plan_of(made)
    needed = [item for item in plan.kernels if 1 in item.stages]
    gone = needed[0]
    present = {item.kernel for item in plan.kernels} - {gone.kernel}
    proof = node_coverage(made, 1, present)
    assert (proof["node"], proof["planned"], proof["present"]) == (1, len(needed), len(needed) - 1)
    assert len(proof["stalls"]) == len([use for use in gone.uses if 1 in use.stages]) > 0
    whole = node_coverage(made, 1, {item.kernel for item in needed})
    assert whole == {"node": 1, "planned": len(needed), "present": len(needed), "stalls": []}
