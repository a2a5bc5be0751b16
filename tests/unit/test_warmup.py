"""Warm-ups: their dummy forwards, walked M and captured graphs."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.backend.base import Backend
from runner.backend.forward_batch import ForwardMode
from runner.backend.gemm_walks import fast_m_list, full_m_list, relaxed_ms
from runner.backend.step_runner import ScheduleRecorder
from runner.config.hf import with_layers
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV4_TINY
from runner.config.warmup import DisaggregationMode, WarmupPolicy, policy_of_flags
from runner.driver.run import record, record_rank
from runner.driver.warmup import dummy_modes
from runner.errors import UserError
from runner.kernels.types import steps_of
from runner.model.model_runner import ModelRunner
from runner.planning.plan import hook_m_list, plan_of
from runner.scenario import Scenario
from runner.schedule import Capture, Mark, Op, Recv, Send, Walk, flatten
from runner.timeline import FIRST_REQUEST

DECODE, EXTEND = ForwardMode.DECODE, ForwardMode.EXTEND
MODEL = with_layers(DSV4_TINY, 2)


@pytest.mark.parametrize(
    ("num_sms", "alignment", "expected"),
    [
        (132, 1, (1, 128, 1024, 2112, 8448)),
        (132, 2, (2, 128, 1024, 2112, 8448)),
        (134, 2, (2, 128, 1024, 2112, 8576)),
        (78, 1, (1, 128, 576, 1216, 4992)),
        # With few SMs the lower bounds apply, and equal sizes are merged.
        (8, 1, (1, 128, 256, 512)),
        (2, 1, (1, 128, 256)),
    ],
)
def test_default_batch_sizes_depend_on_sm_count(
    num_sms: int, alignment: int, expected: tuple[int, ...]
) -> None:
    assert resolved(None, num_sms, alignment) == expected


def resolved(
    sizes: tuple[int, ...] | None, num_sms: int = 132, attn_cp: int = 1
) -> tuple[int, ...]:
    parallel = ParallelConfig(tp=attn_cp, attn_cp=attn_cp)
    return scenario(parallel, batch_sizes=sizes, num_sms=num_sms).resolved_batch_sizes


@given(
    st.lists(st.integers(1, 10_000), min_size=1, max_size=8).map(tuple),
    st.sampled_from([1, 2]),
)
def test_given_batch_sizes_are_rounded_up_to_multiples_of_attn_cp(
    sizes: tuple[int, ...], alignment: int
) -> None:
    found = resolved(sizes, attn_cp=alignment)
    assert list(found) == sorted(set(found))
    assert all(size % alignment == 0 for size in found)
    assert all(any(0 <= after - size < alignment for after in found) for size in sizes)
    assert len(found) <= len(set(sizes))


@pytest.mark.parametrize(("sizes", "shown"), [((4, 0), "4,0"), ((), "(none)")])
def test_batch_sizes_below_one_are_refused(sizes: tuple[int, ...], shown: str) -> None:
    with pytest.raises(UserError) as caught:
        scenario(ParallelConfig(), batch_sizes=sizes)
    assert str(caught.value) == f"batch sizes {shown} must lie in 1..131072"


@pytest.mark.parametrize(
    ("disaggregation", "is_generation", "expected"),
    [
        (DisaggregationMode.NONE, True, (DECODE, EXTEND)),
        (DisaggregationMode.NONE, False, (EXTEND,)),
        (DisaggregationMode.PREFILL, True, (EXTEND,)),
        (DisaggregationMode.PREFILL, False, (EXTEND,)),
        (DisaggregationMode.DECODE, True, (DECODE,)),
        (DisaggregationMode.DECODE, False, ()),
    ],
)
def test_dummy_modes_depend_on_disaggregation_and_kind_of_model(
    disaggregation: DisaggregationMode, is_generation: bool, expected: tuple[ForwardMode, ...]
) -> None:
    options = scenario(ParallelConfig(), disaggregation=disaggregation)
    assert dummy_modes(options, is_generation=is_generation) == expected


def scenario(parallel: ParallelConfig, **options: Any) -> Scenario:
    values = {"policy": WarmupPolicy.PP_PARALLEL, "batch_sizes": (1, 128), **options}
    return Scenario(model=MODEL, parallel=parallel, **values)


def recorded_rank(made: Scenario, rank: int) -> tuple[Op, ...]:
    return flatten(record_rank(made, rank))


def phase(ops: tuple[Op, ...], name: str) -> list[Op]:
    """Operations between a phase's mark and the next phase mark."""
    marks = [i for i, op in enumerate(ops) if isinstance(op, Mark) and op.kind == "phase"]
    first = next(i for i in marks if ops[i] == Mark("phase", name))
    return list(ops[first + 1 : next(i for i in marks if i > first)])


def forwards(ops: list[Op]) -> list[str]:
    return [op.name for op in ops if isinstance(op, Mark) and op.kind == "forward"]


@pytest.mark.parametrize("rank", [0, 1])
def test_every_stage_runs_decode_then_extend_at_each_size(rank: int) -> None:
    ops = recorded_rank(scenario(ParallelConfig(pp=2)), rank)
    assert forwards(phase(ops, "warm-up")) == ["DECODE 1", "EXTEND 1", "DECODE 128", "EXTEND 128"]
    assert forwards(phase(ops, FIRST_REQUEST)) == ["EXTEND 1", "DECODE 1"]
    assert forwards(phase(ops, "requests")) == ["EXTEND 128", "DECODE 128"]


def test_warm_up_does_not_communicate_between_stages() -> None:
    for ops in record(scenario(ParallelConfig(pp=2, tp=2))).ranks:
        assert not [op for op in phase(ops, "warm-up") if isinstance(op, (Send, Recv))]
        for name in (FIRST_REQUEST, "requests"):
            assert [op for op in phase(ops, name) if isinstance(op, (Send, Recv))]


@pytest.mark.parametrize(
    ("parallel", "options"),
    [
        (ParallelConfig(pp=1, tp=2), {}),
        (ParallelConfig(pp=2), {"policy": WarmupPolicy.NONE}),
        (ParallelConfig(pp=2), {"speculative": True}),
    ],
    ids=["one stage", "policy none", "speculative"],
)
def test_no_warm_up_for_one_stage_policy_none_or_speculative_decoding(
    parallel: ParallelConfig, options: dict[str, Any]
) -> None:
    ops = recorded_rank(scenario(parallel, **options), 1)
    assert phase(ops, "warm-up") == []
    assert len(forwards(phase(ops, FIRST_REQUEST))) == len(forwards(phase(ops, "requests"))) == 2


@pytest.mark.parametrize(
    ("disaggregation", "mode"),
    [(DisaggregationMode.PREFILL, "EXTEND"), (DisaggregationMode.DECODE, "DECODE")],
)
def test_disaggregated_server_runs_only_its_own_mode(
    disaggregation: DisaggregationMode, mode: str
) -> None:
    ops = recorded_rank(scenario(ParallelConfig(pp=2), disaggregation=disaggregation), 1)
    assert forwards(phase(ops, "warm-up")) == [f"{mode} 1", f"{mode} 128"]
    assert forwards(phase(ops, FIRST_REQUEST)) == [f"{mode} 1"]
    assert forwards(phase(ops, "requests")) == [f"{mode} 128"]


def test_warm_up_batch_sizes_are_multiples_of_attn_cp() -> None:
    parallel = ParallelConfig(pp=2, tp=2, attn_cp=2)
    ops = recorded_rank(scenario(parallel, batch_sizes=(1, 3)), 3)
    assert forwards(phase(ops, "warm-up")) == ["DECODE 2", "EXTEND 2", "DECODE 4", "EXTEND 4"]


# Policies

FLAGS = {
    # (precompile, fast): policies with pp-parallel unset, off and on
    (None, None): (None, "full", "pp-parallel+full"),
    (None, False): ("full", "full", "pp-parallel+full"),
    (None, True): ("fast", "fast", "pp-parallel+fast"),
    (True, None): ("full", "full", "pp-parallel+full"),
    (True, False): ("full", "full", "pp-parallel+full"),
    (True, True): ("fast", "fast", "pp-parallel+fast"),
    (False, None): ("none", "none", "pp-parallel"),
    (False, False): ("none", "none", "pp-parallel"),
    (False, True): ("none", "none", "pp-parallel"),
}


@pytest.mark.parametrize(("precompile", "fast"), FLAGS)
@pytest.mark.parametrize(("index", "pp_parallel"), [(0, None), (1, False), (2, True)])
def test_sglang_flags_select_the_policy(
    precompile: bool | None, fast: bool | None, index: int, pp_parallel: bool | None
) -> None:
    name = FLAGS[(precompile, fast)][index]
    found = policy_of_flags(precompile=precompile, fast=fast, pp_parallel=pp_parallel)
    assert found == (None if name is None else WarmupPolicy(name))


POLICIES = {
    "none": ("", False),
    "full": ("full", False),
    "fast": ("fast", False),
    "pp-parallel": ("", True),
    "pp-parallel+full": ("full", True),
    "pp-parallel+fast": ("fast", True),
    "relax": ("", False),
    "planned": ("", False),
    "prebuilt": ("", False),
}


def test_walked_list_and_dummy_forwards_of_each_policy() -> None:
    found = {policy.value: (policy.walked, policy.runs_dummies) for policy in WarmupPolicy}
    assert found == POLICIES


@pytest.mark.parametrize("policy", WarmupPolicy, ids=lambda policy: policy.value)
def test_hook_m_list_of_each_policy(policy: WarmupPolicy) -> None:
    lists = {"": None, "full": full_m_list(8192), "fast": fast_m_list(8192)}
    made = scenario(ParallelConfig(), policy=policy, max_tokens=8192)
    assert hook_m_list(made) == lists[POLICIES[policy.value][0]]


@pytest.mark.parametrize(
    ("name", "limit", "steps"),
    [
        ("full", 64, ((1, 64, 1),)),
        ("full", 16384, ((1, 16384, 1),)),
        ("full", 20000, ((1, 16384, 1),)),
        ("fast", 1, ((1, 1, 1),)),
        ("fast", 1027, ((1, 1024, 1), (1026, 1026, 1))),
        ("pp-parallel+fast", 1030, ((1, 1024, 1), (1026, 1030, 2))),
    ],
)
def test_walk_max_m_cuts_the_m_list(name: str, limit: int, steps: Any) -> None:
    found = hook_m_list(
        scenario(ParallelConfig(), policy=WarmupPolicy(name), max_tokens=8192, walk_max_m=limit)
    )
    assert found is not None
    assert steps_of(found) == steps


# Graphs


def captures(ops: list[Op]) -> list[list[Op]]:
    """Operations up to and including each capture."""
    ends = [0, *(i + 1 for i, op in enumerate(ops) if isinstance(op, Capture))]
    assert ends[-1] == len(ops)
    return [ops[first:last] for first, last in pairwise(ends)]


@pytest.mark.parametrize("rank", [0, 1])
def test_graphs_are_captured_largest_first_after_two_eager_forwards(rank: int) -> None:
    made = scenario(ParallelConfig(pp=2), graph_batch_sizes=(2, 16, 8))
    ops = recorded_rank(made, rank)
    order = [op.name for op in ops if isinstance(op, Mark) and op.kind == "phase"]
    assert order == ["warm-up", "graph capture", FIRST_REQUEST, "requests", "end"]
    found = captures(phase(ops, "graph capture"))
    for size, (*eager, capture) in zip((16, 8, 2), found, strict=True):
        once = len(eager) // 2
        assert eager[:once] == eager[once:]
        assert forwards(eager) == [f"DECODE {size}"] * 2
        assert capture == Capture(f"graph DECODE {size}", once)


def test_prefill_node_captures_no_graphs() -> None:
    made = scenario(
        ParallelConfig(pp=2), graph_batch_sizes=(2,), disaggregation=DisaggregationMode.PREFILL
    )
    assert phase(recorded_rank(made, 0), "graph capture") == []


def test_decode_node_captures_graphs() -> None:
    made = scenario(
        ParallelConfig(pp=2), graph_batch_sizes=(2,), disaggregation=DisaggregationMode.DECODE
    )
    assert forwards(phase(recorded_rank(made, 0), "graph capture")) == ["DECODE 2"] * 2


def test_no_capture_phase_without_graphs() -> None:
    ops = recorded_rank(scenario(ParallelConfig(pp=2)), 0)
    assert Mark("phase", "graph capture") not in ops


# Walks of relax


def test_relax_walks_gemms_of_the_stage_on_every_rank() -> None:
    made = scenario(ParallelConfig(pp=2, tp=2), policy=WarmupPolicy.RELAX)
    ranks = [phase(ops, "warm-up") for ops in record(made).ranks]
    for stage in (0, 1):
        expected = []
        for demand in plan_of(made).demands:
            steps = steps_of(relaxed_ms(demand.shape, demand.ms, made.max_tokens))
            if stage in demand.stages and steps:
                expected.append(Walk(demand.shape, steps))
        kinds = {walk.shape.type.name for walk in expected}
        assert kinds == {"GEMM_NT_F8F8BF16", "GROUPED_GEMM_NT_F8F8BF16_CONTIG"}
        assert ranks[2 * stage] == ranks[2 * stage + 1] == expected


def test_walk_max_m_cuts_the_walks_of_relax() -> None:
    made = scenario(ParallelConfig(), policy=WarmupPolicy.RELAX, walk_max_m=64)
    walks = phase(recorded_rank(made, 0), "warm-up")
    # Contiguous GEMMs are gone: 64 rows are less than one block.
    assert {walk.shape.type.name for walk in walks if isinstance(walk, Walk)} == {
        "GEMM_NT_F8F8BF16"
    }
    for walk in walks:
        assert isinstance(walk, Walk)
        assert walk.steps[-1][1] == 64


@pytest.mark.parametrize(
    ("is_generation", "forced", "expected"),
    [
        (True, None, DECODE),
        (False, None, EXTEND),
        (False, DECODE, DECODE),
        (True, EXTEND, EXTEND),
    ],
)
def test_dummy_run_uses_forced_mode_or_that_of_the_kind_of_model(
    is_generation: bool, forced: ForwardMode | None, expected: ForwardMode
) -> None:
    recorder = ScheduleRecorder()
    runner = ModelRunner.build(
        DSV4_TINY, ParallelConfig(pp=2), 1, backend=Backend(recorder, num_sms=132)
    )
    replace(runner, is_generation=is_generation)._dummy_run(3, forward_mode_override=forced)
    assert Mark("forward", f"{expected.name} 3") in recorder.ops


@pytest.mark.parametrize("size", [0, -2, 3])
def test_dummy_batch_size_must_be_a_multiple_of_attn_cp(size: int) -> None:
    parallel = ParallelConfig(tp=2, attn_cp=2)
    backend = Backend(ScheduleRecorder(), num_sms=132)
    runner = ModelRunner.build(DSV4_TINY, parallel, 0, backend=backend)
    with pytest.raises(UserError, match=f"size {size} must be a positive multiple of attn_cp=2"):
        runner._dummy_run(size, forward_mode_override=EXTEND)
