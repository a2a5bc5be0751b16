"""Schedules: JSON format, equality and recording."""

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV4_TINY
from runner.config.warmup import WarmupPolicy
from runner.driver.run import record
from runner.errors import UserError
from runner.kernels.kernel import Kernel
from runner.kernels.types import DeepGemmKernelType, GemmShape, KernelCall
from runner.planning.plan import plan_of
from runner.scenario import Scenario
from runner.schedule import (
    Capture,
    Collective,
    Compute,
    KernelWork,
    Mark,
    Op,
    Recv,
    Schedule,
    Send,
    Walk,
)
from tests.schedules import schedule_from_json

names = st.text(max_size=8)
sizes = st.integers(0, 2**63)
ranks = st.integers(0, 1024)
kinds = st.sampled_from(DeepGemmKernelType)
few_names = st.lists(names, max_size=3).map(tuple)
kernels = st.lists(st.builds(Kernel, names, names, names, few_names), max_size=3).map(tuple)
steps = st.lists(st.tuples(sizes, sizes, sizes), max_size=4).map(tuple)
ops: st.SearchStrategy[Op] = st.one_of(
    st.builds(KernelCall, kinds, sizes, sizes, sizes, sizes, sizes),
    st.builds(Compute, names, sizes, sizes),
    st.builds(Collective, names, st.lists(ranks, max_size=4).map(tuple), sizes),
    st.builds(Send, names, ranks, sizes),
    st.builds(Recv, names, ranks, sizes),
    st.builds(Mark, names, names),
    st.builds(KernelWork, st.sampled_from(["build", "verify", "load"]), kernels),
    st.builds(Walk, st.builds(GemmShape, kinds, sizes, sizes, sizes, sizes), steps),
    st.builds(Capture, names, sizes),
)
schedules = st.builds(
    Schedule, st.lists(st.lists(ops, max_size=5).map(tuple), max_size=4).map(tuple)
)

ONE_OF_EACH = Schedule(
    (
        (
            Mark("phase", "warm-up"),
            KernelCall(DeepGemmKernelType.GEMM_NT_F8F8BF16, 1, 1536, 4096, 1, 132),
            Compute("rms_norm", 10, 20),
            Collective("output", (0, 1), 64),
        ),
        (Send("hidden_states", 0, 8), Recv("next_ids", 0, 16)),
    )
)
CANONICAL = (
    '{"ranks":[[["mark","phase","warm-up"],'
    '["kernel","GEMM_NT_F8F8BF16",1,1536,4096,1,132],'
    '["compute","rms_norm",10,20],'
    '["collective","output",[0,1],64]],'
    '[["send","hidden_states",0,8],["recv","next_ids",0,16]]],"version":1}'
)


@given(schedules)
def test_schedule_round_trips_through_json(schedule: Schedule) -> None:
    back = schedule_from_json(json.loads(json.dumps(schedule.to_json())))
    assert back == schedule
    assert hash(back) == hash(schedule)


@given(schedules, schedules)
def test_json_is_equal_if_and_only_if_schedules_are(first: Schedule, second: Schedule) -> None:
    assert (first.to_json() == second.to_json()) == (first == second)


def test_schedule_has_the_documented_json() -> None:
    assert ONE_OF_EACH.to_json() == json.loads(CANONICAL)


KERNEL_OPS = Schedule(
    (
        (
            Walk(
                GemmShape(DeepGemmKernelType.TF32_HC_PRENORM_GEMM, 24, 2048, 8, 132),
                ((1, 64, 1), (128, 256, 128)),
            ),
            KernelWork("load", (Kernel("a", "a.cuh", "a_impl", ("1, 2", "true")),)),
            Capture("graph DECODE 8", 97),
        ),
    )
)
KERNEL_OPS_CANONICAL = (
    '{"ranks":[[["walk",["TF32_HC_PRENORM_GEMM",24,2048,8,132],[[1,64,1],[128,256,128]]],'
    '["kernels","load",[["a","a.cuh","a_impl",["1, 2","true"]]]],'
    '["capture","graph DECODE 8",97]]],"version":1}'
)


def test_walks_kernel_work_and_captures_have_the_documented_json() -> None:
    assert KERNEL_OPS.to_json() == json.loads(KERNEL_OPS_CANONICAL)
    assert schedule_from_json(json.loads(KERNEL_OPS_CANONICAL)) == KERNEL_OPS
    assert [op.name for op in KERNEL_OPS.ranks[0]] == [
        "walk tf32_hc_prenorm_gemm:24:2048:8",
        "load 1 kernels",
        "graph DECODE 8",
    ]


def changed(value: object) -> object:
    if isinstance(value, DeepGemmKernelType):
        return DeepGemmKernelType.FP8_MQA_LOGITS
    if isinstance(value, tuple):
        return (*value, 9)
    return f"{value}x" if isinstance(value, str) else value + 1


@pytest.mark.parametrize(("rank", "position"), [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)])
def test_json_depends_on_every_field_of_every_operation(rank: int, position: int) -> None:
    op = ONE_OF_EACH.ranks[rank][position]
    for item in fields(op):
        ranks_of_other = [list(ops_of_rank) for ops_of_rank in ONE_OF_EACH.ranks]
        other = replace(op, **{item.name: changed(getattr(op, item.name))})
        ranks_of_other[rank][position] = other
        schedule = Schedule(tuple(tuple(ops_of_rank) for ops_of_rank in ranks_of_other))
        assert schedule.to_json() != ONE_OF_EACH.to_json()


def test_json_depends_on_order_of_operations() -> None:
    turned = Schedule((ONE_OF_EACH.ranks[0][::-1], ONE_OF_EACH.ranks[1]))
    assert turned != ONE_OF_EACH
    assert turned.to_json() != ONE_OF_EACH.to_json()


def test_recording_is_reproducible_and_round_trips_through_json() -> None:
    scenario = Scenario(
        model=DSV4_TINY,
        parallel=ParallelConfig(pp=2, tp=2),
        policy=WarmupPolicy.PP_PARALLEL,
        batch_sizes=(1, 64),
    )
    schedule = record(scenario)
    assert len(schedule.ranks) == 4
    assert record(scenario) == schedule
    assert schedule_from_json(json.loads(json.dumps(schedule.to_json()))) == schedule
    assert record(replace(scenario, policy=WarmupPolicy.NONE)) != schedule


def planned_scenario(**values: int) -> Scenario:
    return Scenario(
        model=DSV4_TINY,
        parallel=ParallelConfig(**values),
        policy=WarmupPolicy.PLANNED,
        batch_sizes=(1,),
        max_tokens=64,
    )


def kernel_work(schedule: Schedule, rank: int, action: str) -> KernelWork:
    (work,) = (
        op for op in schedule.ranks[rank] if isinstance(op, KernelWork) and op.action == action
    )
    return work


def test_planned_schedule_builds_every_kernel_on_exactly_one_node() -> None:
    scenario = planned_scenario(pp=2, tp=2, nodes=2)
    schedule = record(scenario)
    built = [kernel_work(schedule, rank, "build").kernels for rank in range(4)]
    everything = {item.kernel for item in plan_of(scenario).kernels}
    assert built[1] == built[3] == ()
    assert set(built[0]) | set(built[2]) == everything
    assert not set(built[0]) & set(built[2])
    assert len(built[0]) + len(built[2]) == len(everything)
    for rank in range(4):
        stage = rank // 2
        own = {item.kernel for item in plan_of(scenario).kernels if stage in item.stages}
        assert set(kernel_work(schedule, rank, "load").kernels) == own
    assert schedule_from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


def test_planned_schedule_builds_on_one_rank_per_node() -> None:
    schedule = record(planned_scenario(pp=1, tp=2, nodes=1))
    assert [bool(kernel_work(schedule, rank, "build").kernels) for rank in (0, 1)] == [True, False]


def test_batch_size_above_max_tokens_is_refused_for_prebuilt() -> None:
    with pytest.raises(UserError) as caught:
        Scenario(
            model=DSV4_TINY,
            parallel=ParallelConfig(),
            policy=WarmupPolicy.PREBUILT,
            batch_sizes=(1, 65),
            max_tokens=64,
        )
    assert str(caught.value) == (
        "batch size 65 is above --max-tokens 64, the limit that prebuilt prepares for: give "
        "smaller ones"
    )
