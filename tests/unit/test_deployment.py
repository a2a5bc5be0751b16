"""Demands of a deployment: every GEMM call of a forward is planned, and no other M."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.backend.base import Backend
from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.backend.step_runner import ScheduleRecorder
from runner.backend.token_to_m import (
    MASKED_BUDGET,
    contiguous_rows,
    masked_bytes,
    masked_rows,
    masked_token_limit,
)
from runner.config.hf import with_layers
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV3, DSV4, PRESETS
from runner.config.warmup import DisaggregationMode
from runner.driver.run import record_forward
from runner.errors import UserError
from runner.kernels.kernel import Kernel
from runner.kernels.rules import RULES, kernels_of
from runner.kernels.types import CONTIGUOUS_TYPES, MASKED_TYPES, GemmShape, KernelCall
from runner.kernels.types import DeepGemmKernelType as T
from runner.model.model_runner import ModelRunner
from runner.model.strategy import COMM_SMS, STRATEGIES
from runner.planning.demands import demands
from runner.planning.plan import make_plan
from runner.scenario import Scenario

FEW = {"dsv4": with_layers(DSV4, 5), "dsv3": with_layers(DSV3, 5)}


def deployment(model: str = "dsv4", max_tokens: int = 2048, **values: Any) -> Scenario:
    layout = {
        name: values.pop(name)
        for name in ("pp", "tp", "ep", "moe_a2a", "attn_cp")
        if name in values
    }
    return Scenario(
        model=FEW[model], parallel=ParallelConfig(**layout), max_tokens=max_tokens, **values
    )


OVERLAP = (STRATEGIES["deepseek-decode"], STRATEGIES["deepseek-prefill"])

LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("dsv4", {"tp": 2}),
    ("dsv4", {"tp": 2, "pp": 2}),
    ("dsv4", {"tp": 8, "ep": True}),
    ("dsv4", {"tp": 4, "attn_cp": 2}),
    ("dsv3", {"tp": 8}),
    ("dsv4", {"tp": 8, "ep": True, "moe_a2a": True}),
    ("dsv4", {"tp": 4, "moe_a2a": True, "overlap": OVERLAP}),
    ("dsv3", {"tp": 8, "ep": True, "moe_a2a": True, "overlap": OVERLAP}),
    ("dsv4", {"tp": 2, "overlap": OVERLAP}),
]


@cache
def planned(index: int) -> tuple[Scenario, frozenset[Kernel]]:
    model, layout = LAYOUTS[index]
    made = deployment(model, max_tokens=12000, **layout)
    return made, frozenset(item.kernel for item in make_plan(demands(made), RULES).kernels)


@settings(max_examples=40, deadline=None)
@given(
    index=st.integers(0, len(LAYOUTS) - 1),
    tokens=st.integers(1, 12000) | st.integers(1, 300),
    mode=st.sampled_from([ForwardMode.EXTEND, ForwardMode.DECODE]),
)
def test_forward_of_any_size_runs_only_planned_kernels(
    index: int, tokens: int, mode: ForwardMode
) -> None:
    made, kernels = planned(index)
    step = made.parallel.attn_cp
    size = -(-tokens // step) * step
    batch = (ForwardBatch.extend if mode.is_extend else ForwardBatch.decode)((1,) * size)
    calls = {
        call
        for stage in range(made.parallel.pp)
        for _, call in record_forward(made, made.parallel.rank_of(stage, 0), batch).calls
    }
    for call in calls:
        assert set(kernels_of(call)) <= kernels, call.describe()


def by_type(made: Scenario) -> dict[T, list[tuple[int, int]]]:
    """(first, last) M of each demand, by GEMM type."""
    found: dict[T, list[tuple[int, int]]] = {}
    for demand in demands(made):
        found.setdefault(demand.shape.type, []).append((demand.ms[0], demand.ms[-1]))
    return found


def test_m_limits_follow_from_the_deployment() -> None:
    limits = by_type(deployment(max_tokens=1000, tp=2))
    assert set(limits[T.GEMM_NT_F8F8BF16]) == {(1, 1000)}
    # 1000 tokens x 6 choices over 256 experts, each padded to 128 rows.
    bound = contiguous_rows(6000, 256)
    assert bound == 128 * (256 + (6000 - 256) // 128)
    assert set(limits[T.GROUPED_GEMM_NT_F8F8BF16_CONTIG]) == {(128, bound)}
    assert set(limits[T.GROUPED_GEMM_NT_F8F8BF16_MASKED]) == {(1, 24)}
    assert T.FP8_MQA_LOGITS not in limits
    assert T.FP8_MQA_LOGITS in by_type(deployment(max_tokens=8192, tp=2))


def test_decode_node_plans_only_its_decode_batch_sizes() -> None:
    sizes = (1, 2, 4, 8)
    node = deployment(decode_batch_sizes=sizes, disaggregation=DisaggregationMode.DECODE, tp=2)
    for demand in demands(node):
        assert set(demand.ms) <= set(sizes)
    assert T.GROUPED_GEMM_NT_F8F8BF16_CONTIG not in by_type(node)


def test_prefill_node_plans_no_masked_gemms() -> None:
    node = deployment(disaggregation=DisaggregationMode.PREFILL, tp=2)
    assert T.GROUPED_GEMM_NT_F8F8BF16_MASKED not in by_type(node)
    assert T.GROUPED_GEMM_NT_F8F8BF16_CONTIG in by_type(node)


def test_excluded_gemm_types_are_not_planned() -> None:
    made = deployment(without=(T.PAGED_MQA_LOGITS_METADATA,), tp=2)
    assert T.PAGED_MQA_LOGITS_METADATA not in by_type(made)


def test_reduced_sm_count_adds_a_second_set_of_demands() -> None:
    plain, overlapped = deployment(tp=2), deployment(tp=2, reduced_num_sms=(112,))
    once, twice = demands(plain), demands(overlapped)
    extra = [demand for demand in twice if demand.shape.num_sms == 112]
    assert tuple(demand for demand in twice if demand.shape.num_sms == 132) == once
    hc = sum(demand.shape.type is T.TF32_HC_PRENORM_GEMM for demand in once)
    assert len(extra) == len(once) - hc
    assert all(demand.shape.type is not T.TF32_HC_PRENORM_GEMM for demand in extra)


def test_overlap_strategy_with_comm_sms_adds_demands_of_its_mode() -> None:
    plain, overlapped = deployment(tp=2), deployment(tp=2, overlap=OVERLAP)
    once, twice = demands(plain), demands(overlapped)
    masked = {demand.shape: demand.ms for demand in twice if demand.shape.type in MASKED_TYPES}
    assert [demand for demand in twice if demand.shape.num_sms == 132] == [
        replace(demand, ms=masked.get(demand.shape, demand.ms)) for demand in once
    ]
    # Overlapped DECODE of up to 2048 tokens runs experts on half batches, so fewer rows.
    of_once = {d.shape: d.ms for d in once if d.shape.type in MASKED_TYPES}
    assert {(ms[-1], masked[shape][-1]) for shape, ms in of_once.items()} == {(42, 24)}
    extra = [demand for demand in twice if demand.shape.num_sms != 132]
    assert {demand.shape.num_sms for demand in extra} == {132 - COMM_SMS}
    # EXTEND halves use fewer SMs. DECODE, the only mode with masked experts, keeps all SMs.
    assert {demand.shape.type for demand in once} - {demand.shape.type for demand in extra} == {
        T.TF32_HC_PRENORM_GEMM,
        T.GROUPED_GEMM_NT_F8F8BF16_MASKED,
    }
    dense = [demand for demand in extra if demand.shape.type is T.GEMM_NT_F8F8BF16]
    assert dense and all(demand.ms == tuple(range(1, 2048)) for demand in dense)


def test_all_to_all_moe_ranks_plan_their_share_of_the_tokens() -> None:
    made = deployment(tp=4, moe_a2a=True, max_tokens=1000)
    shapes = {
        (demand.shape.type, demand.shape.n, demand.shape.k): demand.ms[-1]
        for demand in demands(made)
    }
    assert shapes[T.GEMM_NT_F8F8BF16, 1536, 4096] == 1000  # wqkv_a: attention has all tokens
    assert shapes[T.GEMM_NT_BF16BF16F32, 256, 4096] == 250  # gate
    assert shapes[T.GEMM_NT_F8F8BF16, 4096, 4096] == 250  # shared experts, whole
    assert (T.GEMM_NT_F8F8BF16, 1024, 4096) not in shapes  # and no slice of them


def test_planned_m_equals_m_of_all_possible_forwards() -> None:
    """Except for contiguous experts, whose M depends on routing."""
    limit = 24
    made = deployment(
        tp=4, moe_a2a=True, ep=True, max_tokens=limit, overlap=(STRATEGIES["deepseek-prefill"],)
    )
    called = {
        (GemmShape(call.type, call.n, call.k, call.num_groups, call.num_sms), call.m)
        for call in calls_of_every_forward(made, limit)
    }
    planned = {(demand.shape, m) for demand in demands(made) for m in demand.ms}
    contiguous = {pair for pair in planned if pair[0].type in CONTIGUOUS_TYPES}
    assert planned - contiguous == {pair for pair in called if pair[0].type not in CONTIGUOUS_TYPES}
    assert {pair for pair in called if pair[0].type in CONTIGUOUS_TYPES} <= contiguous


@pytest.mark.parametrize("sizes", [(2,), (9,), (1, 5), (2, 64), (100,), (4001,)])
@pytest.mark.parametrize(("model", "pp"), [("dsv4", 1), ("dsv3", 1), ("dsv3", 2)])
@pytest.mark.parametrize("sms", [0, 20])
def test_decode_node_with_overlap_plans_exactly_its_calls(
    sizes: tuple[int, ...], model: str, pp: int, sms: int
) -> None:
    """Dense layers run the whole batch, layers with experts run half batches."""
    overlap = (replace(STRATEGIES["deepseek-decode"], comm_sms=sms),)
    made = deployment(
        model,
        pp=pp,
        tp=8,
        moe_a2a=True,
        ep=True,
        max_tokens=8192,
        decode_batch_sizes=sizes,
        disaggregation=DisaggregationMode.DECODE,
        overlap=overlap,
    )
    called = set()
    for stage in range(pp):
        recorder = ScheduleRecorder()
        runner = ModelRunner.build(
            made.model,
            made.parallel,
            made.parallel.rank_of(stage, 0),
            backend=Backend(recorder, made.num_sms),
            overlap=made.overlap,
        )
        for size in sizes:
            batch = ForwardBatch.decode((1,) * size)
            runner.forward(batch, runner.dummy_proxy(batch))
        called |= {
            (GemmShape(call.type, call.n, call.k, call.num_groups, call.num_sms), call.m)
            for call in recorder.ops
            if isinstance(call, KernelCall)
        }
    planned = {(demand.shape, m) for demand in demands(made) for m in demand.ms}
    contiguous = {pair for pair in planned if pair[0].type in CONTIGUOUS_TYPES}
    rows = {pair for pair in called if pair[0].type not in CONTIGUOUS_TYPES}
    # For small batches a dense layer may have the GEMM shape and M of an expert layer.
    assert rows <= planned and (planned - contiguous == rows or max(sizes) < 4 * made.parallel.tp)
    assert {pair for pair in called if pair[0].type in CONTIGUOUS_TYPES} <= contiguous


def calls_of_every_forward(made: Scenario, limit: int) -> set[KernelCall]:
    """Calls of DECODE of any size and of EXTEND of one or two prompts of any length."""
    recorder = ScheduleRecorder()
    runner = ModelRunner.build(
        made.model,
        made.parallel,
        0,
        backend=Backend(recorder, made.num_sms),
        overlap=made.overlap,
    )
    for tokens in range(1, limit + 1):
        runner.forward(ForwardBatch.decode((1,) * tokens))
        runner.forward(ForwardBatch.extend((tokens,)))
        for first in range(1, tokens):
            runner.forward(ForwardBatch.extend((first, tokens - first)))
    return {op for op in recorder.ops if isinstance(op, KernelCall)}


def test_context_parallel_rank_plans_attention_for_its_own_tokens() -> None:
    made = deployment(max_tokens=1000, tp=4, attn_cp=2, disaggregation=DisaggregationMode.PREFILL)
    last = {
        demand.shape.n: demand.ms[-1]
        for demand in demands(made)
        if demand.shape.type is T.GEMM_NT_F8F8BF16
    }
    assert last[1536] == 500  # wqkv_a
    assert last[1024] == 1000  # shared experts' gate_up


def test_demands_name_the_stages_that_run_them() -> None:
    found = {
        demand.shape: demand.stages for demand in demands(deployment(pp=5, tp=2, max_tokens=256))
    }
    # Layers 0 and 1 have sliding-window attention only; layers 2 to 4 compress by 4, 128, 4.
    compressed = [stages for shape, stages in found.items() if shape.n == 8192]
    assert compressed == [(2, 4)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max-tokens 0 must lie in 1..131072"),
        ({"max_tokens": 200000}, "max-tokens 200000 must lie in 1..131072"),
        ({"num_sms": 0}, "num-sms 0 must lie in 1..1024"),
        ({"reduced_num_sms": (140,)}, "reduced num-sms 140 must lie in 1..132"),
        ({"decode_batch_sizes": ()}, "decode batch sizes (none) must lie in 1..131072"),
        ({"decode_batch_sizes": (4, 0)}, "decode batch sizes 4,0 must lie in 1..131072"),
        ({"tp": 3}, "tp=3 must divide"),
    ],
)
def test_invalid_deployment_is_a_one_line_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        deployment(**values)
    assert message in str(caught.value)


@given(st.integers(1, 256), st.sampled_from([4096, 7168]), st.sampled_from([256, 1024, 2048]))
def test_masked_token_limit_is_the_largest_that_fits_the_budget(
    experts: int, hidden: int, width: int
) -> None:
    limit = masked_token_limit(experts, hidden, width)
    assert masked_bytes(experts, masked_rows(limit + 1), hidden, width) > MASKED_BUDGET
    if limit:
        assert masked_bytes(experts, masked_rows(limit), hidden, width) <= MASKED_BUDGET


def test_number_of_kernels_of_dsv4_with_pp_4_and_tp_2() -> None:
    made = Scenario(model=PRESETS["dsv4"], parallel=ParallelConfig(pp=4, tp=2))
    plan = make_plan(demands(made), RULES)
    counts: dict[str, int] = {}
    for item in plan.kernels:
        counts[item.kernel.name] = counts.get(item.kernel.name, 0) + 1
    assert counts == {
        "sm90_paged_mqa_logits_metadata": 512,
        "sm90_tf32_hc_prenorm_gemm": 21,
        "transpose_fp32": 2,
        "sm90_fp8_gemm_1d2d": 52,
        "sm90_bf16_gemm": 28,
        "sm90_m_grouped_fp8_gemm_contiguous_1d2d": 25,
        "sm90_fp8_m_grouped_gemm_masked_1d2d": 2,
        "sm90_fp8_paged_mqa_logits": 1,
        "sm90_fp8_mqa_logits": 1,
    }
