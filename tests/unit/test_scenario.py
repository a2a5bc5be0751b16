"""Recorded scenarios equal what a backend announces when the ranks run."""

from __future__ import annotations

from dataclasses import fields, replace
from math import inf, nan
from typing import Any

import pytest

from runner.backend.base import Backend
from runner.backend.step_runner import ScheduleRecorder
from runner.config.hf import from_hf, with_layers
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV4, DSV4_TINY
from runner.config.warmup import DisaggregationMode, WarmupPolicy
from runner.driver.run import record, record_parts, record_rank, run_rank
from runner.driver.warmup import execution_hook
from runner.errors import UserError
from runner.model.model_runner import ModelRunner
from runner.model.strategy import STRATEGIES
from runner.planning.plan import plan_of
from runner.scenario import Scenario
from runner.schedule import (
    BARRIER,
    EXCHANGE,
    OF_HOSTS,
    Collective,
    KernelWork,
    Mark,
    Op,
    Walk,
    flatten,
)
from tests.models import DSV3_SMALL

TINY = with_layers(DSV4_TINY, 3)
SMALL_V3 = with_layers(from_hf(DSV3_SMALL, "dsv3-small"), 3)
POLICIES = list(WarmupPolicy)


def scenario(
    policy: WarmupPolicy = WarmupPolicy.NONE, model: Any = TINY, **values: Any
) -> Scenario:
    layout = [item.name for item in fields(ParallelConfig)]
    parallel = {name: values.pop(name) for name in layout if name in values}
    return Scenario(
        model=model,
        parallel=ParallelConfig(**parallel),
        policy=policy,
        **{"batch_sizes": (1, 64), "max_tokens": 256, **values},
    )


def recorded_rank(made: Scenario, rank: int) -> tuple[Op, ...]:
    return flatten(record_rank(made, rank))


def announced(made: Scenario, rank: int) -> tuple[Op, ...]:
    """Operations that a backend with the scenario's hook announces as the rank runs on shapes."""
    recorder = ScheduleRecorder()
    backend = Backend(
        recorder,
        made.num_sms,
        bf16_fp32_algo=made.bf16_fp32_algo,
        hook=execution_hook(made, rank),
    )
    layout = (made.model, made.parallel, rank)
    runner = ModelRunner.build(*layout, backend=backend, overlap=made.overlap)
    run_rank(runner, made)
    return tuple(recorder.ops)


def phases(ops: tuple[Op, ...]) -> list[str]:
    return [op.name for op in ops if isinstance(op, Mark) and op.kind == "phase"]


def walks(ops: tuple[Op, ...]) -> list[Walk]:
    return [op for op in ops if isinstance(op, Walk)]


# Walks are recorded where a real backend makes them

EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "graphs": {"graph_batch_sizes": (4, 2)},
    "limits": {"walk_max_m": 64, "walk_memory": 3e6, "compile_lock": True},
    "stream": {"stream": (5, 200, 7), "prompt_len": 3},
    "speculative": {"speculative": True},
    "prefill": {"disaggregation": DisaggregationMode.PREFILL},
    "decode": {"disaggregation": DisaggregationMode.DECODE, "graph_batch_sizes": (2,)},
}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.value)
@pytest.mark.parametrize("extra", EXTRAS)
def test_recorded_operations_equal_announced_ones(policy: WarmupPolicy, extra: str) -> None:
    """On node leaders and other ranks, in both stages."""
    made = scenario(policy, pp=2, tp=2, nodes=2, **EXTRAS[extra])
    for rank in range(4):
        assert recorded_rank(made, rank) == announced(made, rank), f"rank {rank}"


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.value)
@pytest.mark.parametrize("name", ["deepseek-prefill", "deepseek-decode", "dsv4-prefill"])
def test_recorded_operations_equal_announced_ones_with_two_batch_overlap(
    policy: WarmupPolicy, name: str
) -> None:
    """Halves run different kernels; graphs are captured of a split DECODE."""
    made = scenario(
        policy,
        tp=2,
        pp=2,
        ep=True,
        moe_a2a=True,
        overlap=(STRATEGIES[name],),
        graph_batch_sizes=(4,),
    )
    for rank in (0, 3):
        assert recorded_rank(made, rank) == announced(made, rank), f"rank {rank}"


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.value)
def test_recorded_operations_equal_announced_ones_for_dsv3(policy: WarmupPolicy) -> None:
    made = scenario(policy, SMALL_V3, pp=2, tp=2, attn_cp=2, nodes=1)
    for rank in range(4):
        assert recorded_rank(made, rank) == announced(made, rank), f"rank {rank}"


@pytest.mark.parametrize("policy", ["full", "fast", "pp-parallel+full", "pp-parallel+fast"])
def test_only_the_leader_of_each_node_walks(policy: str) -> None:
    made = scenario(WarmupPolicy(policy), pp=2, tp=2, nodes=2)
    found = [bool(walks(ops)) for ops in record(made).ranks]
    assert found == [True, False, True, False]


def test_walk_comes_right_before_the_first_call_of_its_gemm() -> None:
    ops = recorded_rank(scenario(WarmupPolicy.FULL, walk_max_m=64), 0)
    at = [index for index, op in enumerate(ops) if isinstance(op, Walk)]
    for index in at:
        following = next(op for op in ops[index:] if not isinstance(op, Walk))
        walk = ops[index]
        assert isinstance(walk, Walk)
        assert (following.type, following.n, following.k) == (  # type: ignore[union-attr]
            walk.shape.type,
            walk.shape.n,
            walk.shape.k,
        )
    assert len(set(at)) == len({op.shape for op in walks(ops)})


def test_policies_differ_only_in_their_walks() -> None:
    def rest(policy: str) -> list[Op]:
        ops = recorded_rank(scenario(WarmupPolicy(policy), pp=2), 0)
        return [op for op in ops if not isinstance(op, Walk)]

    assert rest("full") == rest("fast") == rest("relax") == rest("none")
    assert rest("pp-parallel+full") == rest("pp-parallel+fast") == rest("pp-parallel")


def test_walk_memory_of_the_scenario_overrides_free_memory() -> None:
    made = scenario(WarmupPolicy.FULL, walk_memory=1e9)
    assert execution_hook(made, 0, lambda: 5e9).budget() == 1e9
    free = replace(made, walk_memory=None)
    assert execution_hook(free, 0, lambda: 5e9).budget() == 5e9
    assert execution_hook(free, 0).budget() == inf


# What is shared between ranks

LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "a node a stage": (TINY, {"pp": 2, "tp": 2, "nodes": 2}),
    "a node a rank": (TINY, {"pp": 2, "tp": 2, "nodes": 4}),
    "nodes that start in the middle of a stage": (TINY, {"pp": 3, "tp": 2, "nodes": 2}),
    "a stage over two nodes": (with_layers(DSV4, 3), {"tp": 4, "nodes": 2}),
    "whole experts": (TINY, {"pp": 2, "tp": 2, "ep": True}),
    "split attention": (TINY, {"pp": 2, "tp": 2, "attn_cp": 2, "nodes": 2}),
    "replicas": (TINY, {"pp": 2, "tp": 2, "replicas": 2, "nodes": 2}),
    "replicas that share nodes": (TINY, {"tp": 2, "replicas": 4, "nodes": 2}),
    "unequal stages": (TINY, {"pp": 2, "tp": 2, "stage_layers": (2, 1), "nodes": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.value)
def test_recording_all_ranks_equals_recording_each_rank(policy: WarmupPolicy, layout: str) -> None:
    model, values = LAYOUTS[layout]
    made = scenario(policy, model, **values)
    together = record(made).ranks
    for rank, ops in enumerate(together):
        assert ops == recorded_rank(made, rank) == announced(made, rank), f"rank {rank}"


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.value)
def test_folded_replicas_end_at_their_last_shared_collective(policy: WarmupPolicy) -> None:
    made = scenario(policy, pp=2, tp=2, replicas=2, nodes=4)
    whole, folded = record(made).ranks, tuple(map(flatten, record_parts(made, folded=True)))
    lasts = {WarmupPolicy.PLANNED: EXCHANGE, WarmupPolicy.PREBUILT: BARRIER}
    assert folded[:4] == whole[:4]
    for rank in range(4, 8):
        shared = (i for i, op in enumerate(whole[rank]) if getattr(op, "name", "") in OF_HOSTS)
        end = max((index + 1 for index in shared), default=0)
        assert folded[rank] == whole[rank][:end]
        assert bool(end) == (policy in lasts)
        if end:
            last = folded[rank][-1]
            assert isinstance(last, Collective)
            assert (last.name, last.group) == (lasts[policy], tuple(range(8)))


def test_prebuilt_ranks_load_after_all_have_verified() -> None:
    """A barrier separates verifying and loading, so nothing compiles before all have verified."""
    made = scenario(WarmupPolicy.PREBUILT, pp=2, tp=2, replicas=2, nodes=4)
    for ops in record(made).ranks:
        verify, barrier, load = (
            op
            for op in ops
            if isinstance(op, KernelWork) or (isinstance(op, Collective) and op.name in OF_HOSTS)
        )
        assert isinstance(verify, KernelWork) and verify.action == "verify"
        assert barrier == Collective(BARRIER, tuple(range(8)), 0)
        assert isinstance(load, KernelWork) and load.action == "load"


def test_planned_nodes_of_all_replicas_divide_the_build() -> None:
    made = scenario(WarmupPolicy.PLANNED, pp=2, tp=2, replicas=2, nodes=4)
    shares = [
        op.kernels
        for ops in record(made).ranks
        for op in ops
        if isinstance(op, KernelWork) and op.action == "build"
    ]
    assert [bool(share) for share in shares] == [True, False] * 4
    every = [kernel for share in shares for kernel in share]
    assert len(every) == len(set(every)) == len(plan_of(made).kernels)


# Requests and phases


def test_first_request_has_the_smallest_batch_size() -> None:
    ops = recorded_rank(scenario(batch_sizes=(64, 8, 16)), 0)
    assert phases(ops) == ["warm-up", "first request", "requests", "end"]
    forwards = [op.name for op in ops if isinstance(op, Mark) and op.kind == "forward"]
    assert forwards == [f"{mode} {size}" for size in (8, 16, 64) for mode in ("EXTEND", "DECODE")]
    one = recorded_rank(scenario(batch_sizes=(4,)), 0)
    assert phases(one) == ["warm-up", "first request", "end"]


def test_stream_replaces_requests_after_the_first() -> None:
    made = scenario(stream=(7, 3, 7), batch_sizes=(2, 64), tp=2, attn_cp=2)
    assert list(made.request_tokens) == [2, 8, 4, 8]
    assert made.resolved_batch_sizes == (2, 64)
    assert list(scenario(stream=()).request_tokens) == [1]


def test_invalid_streams_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        scenario(stream=(4, 0))
    assert str(caught.value) == "token counts 4,0 must lie in 1..131072"
    with pytest.raises(UserError) as caught:
        scenario(WarmupPolicy.PLANNED, stream=(300,))
    assert str(caught.value) == (
        "token count 300 is above --max-tokens 256, the limit that planned prepares for: give "
        "smaller ones"
    )
    assert scenario(WarmupPolicy.FULL, stream=(300,)).request_tokens[1] == 300


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"batch_sizes": (1, 1000000)}, "batch sizes 1,1000000 must lie in 1..131072"),
        ({"stream": (1000000,)}, "token counts 1000000 must lie in 1..131072"),
        ({"graph_batch_sizes": (1000000,)}, "graph batch sizes 1000000 must lie in 1..131072"),
        (
            {"batch_sizes": (131072,), "tp": 3, "attn_cp": 3},
            "batch sizes 131072 must lie in 1..131070",
        ),
        ({"walk_max_m": 0}, "walk_max_m=0 must be at least 1"),
        ({"walk_memory": -1.0}, "walk_memory=-1.0 must be above 0"),
        ({"walk_memory": nan}, "walk_memory=nan must be above 0"),
        ({"batch_sizes": [1, 64]}, "batch_sizes=[1, 64] must be a tuple"),
        ({"stage_layers": [1, 2], "pp": 2}, "stage_layers=[1, 2] must be a tuple"),
    ],
)
def test_values_that_no_run_can_have_are_refused(values: dict[str, Any], line: str) -> None:
    thirds = {"num_attention_heads": 6, "vocab_size": 1536, "intermediate_size": 1536}
    moe = replace(SMALL_V3.moe, moe_intermediate_size=384)
    model = replace(SMALL_V3, moe=moe, **thirds)
    with pytest.raises(UserError) as caught:
        scenario(WarmupPolicy.FULL, model, **values)
    assert str(caught.value) == line
