"""The planner, against measurements and against the rules for every M."""

import struct
from bisect import bisect_left
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.errors import UserError
from runner.kernels import heuristics_sm90 as sm90
from runner.kernels.describe import config_of, config_of_source, in_words
from runner.kernels.rules import RULED_TYPES, RULES, kernels_of
from runner.kernels.table import Demand, union
from runner.kernels.types import CONTIGUOUS_TYPES, GemmShape, KernelCall
from runner.kernels.types import DeepGemmKernelType as T
from runner.planning.gemm_spec import gemm_demands
from runner.planning.plan import make_plan, plan_to_json
from tests.measured import MEASURED, TYPES


def spec_of(shape: dict[str, Any], *, groups: bool) -> str:
    text = f"{TYPES[shape['kind']].name.lower()}:{shape['n']}:{shape['k']}"
    return f"{text}:{shape['g']}" if groups or shape["g"] > 1 else text


@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize("shape", MEASURED, ids=lambda shape: shape["tag"])
def test_plan_of_a_gemm_matches_compiles_measured_on_h200(
    shape: dict[str, Any], groups: bool
) -> None:
    plan = make_plan(gemm_demands(spec_of(shape, groups=groups), max_m=16384, num_sms=132), RULES)
    kernels = plan_to_json(plan, None)["kernels"]
    first_m = sorted({item["m_ranges"][0][0] for item in kernels})
    compiled, count = [m for m, _ in shape["compiles"]], shape["kernels"]
    if TYPES[shape["kind"]] is T.TF32_HC_PRENORM_GEMM:
        # The measured walk chose splits by M only: 132 and 66 up to 128 rows. Servers also cap
        # them by K, to 64 in both cases.
        compiled.remove(65)
        count -= 1
    assert (len(kernels), first_m) == (count, compiled)


def test_number_of_splits_is_capped_by_k() -> None:
    found = gemm_demands("tf32_hc_prenorm_gemm:24:16384", max_m=16384, num_sms=132)
    splits = {demand.shape.num_groups: (demand.ms[0], demand.ms[-1]) for demand in found}
    assert splits[64] == (1, 128)
    assert 132 not in splits and 66 not in splits and splits[44] == (129, 192)


def shapes() -> st.SearchStrategy[GemmShape]:
    def sizes(kind: T) -> st.SearchStrategy[GemmShape]:
        n = st.integers(1, 128).map(lambda x: 64 * x)
        k = st.integers(1, 64).map(lambda x: 128 * x)
        if kind is T.TF32_HC_PRENORM_GEMM:
            n = st.sampled_from([8, 16, 24, 32])
        elif kind in (T.FP8_MQA_LOGITS, T.FP8_PAGED_MQA_LOGITS):
            n, k = st.sampled_from([32, 64]), st.sampled_from([64, 128])
        groups = st.sampled_from([1, 4, 32, 256])
        return st.builds(GemmShape, st.just(kind), n, k, groups, st.sampled_from([132, 112, 78]))

    return st.sampled_from(sorted(RULED_TYPES)).flatmap(sizes)


@settings(max_examples=150, deadline=None)
@given(shape=shapes(), last=st.integers(128, 20000), data=st.data())
def test_planned_kernels_of_each_m_are_those_its_call_runs(
    shape: GemmShape, last: int, data: st.DataObject
) -> None:
    step = 128 if shape.type in CONTIGUOUS_TYPES else 1
    ms = range(step, last + 1, step)
    planned = RULES.kernel_ranges(shape, ms)
    near = st.sampled_from(list(ms)) | st.sampled_from(list(ms)[:80])
    for m in [ms[0], ms[-1], *data.draw(st.lists(near, max_size=20))]:
        serving = {
            kernel
            for kernel, ranges in planned.items()
            if any(first <= m <= last for first, last in ranges)
        }
        assert serving == set(kernels_of(shape.call(m)))


@given(shape=shapes(), ms=st.sets(st.integers(1, 3000), min_size=1, max_size=40))
def test_kernel_ranges_consider_only_the_given_m(shape: GemmShape, ms: set[int]) -> None:
    ordered = sorted(128 * m for m in ms) if shape.type in CONTIGUOUS_TYPES else sorted(ms)
    planned = RULES.kernel_ranges(shape, ordered)
    assert set(planned) == {kernel for m in ordered for kernel in kernels_of(shape.call(m))}
    for ranges in planned.values():
        for first, last in ranges:
            assert first in ordered and last in ordered
            assert bisect_left(ordered, first) <= bisect_left(ordered, last)


def test_no_m_gives_no_kernels() -> None:
    assert RULES.kernel_ranges(GemmShape(T.GEMM_NT_F8F8BF16, 4096, 1024, 1, 132), ()) == {}


def f32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]  # type: ignore[no-any-return]


def library_cycles(desc: sm90.GemmDesc, layout: sm90.Layout, m: int) -> int:
    """Line-by-line port of ``get_layout_info`` in csrc/jit_kernels/heuristics/sm90.hpp."""
    groups = 1 if desc.gemm_type is sm90.GemmType.CONTIGUOUS else desc.num_groups
    blocks = sm90.ceil_div(m, layout.block_m) * sm90.ceil_div(desc.n, layout.block_n) * groups
    waves = sm90.ceil_div(blocks, desc.num_sms)
    ab, cd = desc.ab_bytes, desc.cd_bytes
    l2_ab = desc.k * (layout.block_m // layout.cluster_n + layout.block_n // layout.cluster_m) * ab
    l1_ab = desc.k * (layout.block_m + layout.block_n) * ab
    tile = layout.block_m * layout.block_n * cd
    l1_tc = desc.k * (max(64, layout.block_m) + layout.block_n) * ab + tile
    l2 = (l2_ab + tile) * blocks // int(min(64.0 * desc.num_sms, 8e6 / 1.3e3))
    l1 = (l1_ab + l1_tc + tile) * blocks // (128 * desc.num_sms)
    if layout.cluster_size > 1 and waves <= 1:
        return 2**63 - 1
    return int(f32(f32(max(l1, l2)) / f32(f32(blocks) / f32(waves * desc.num_sms))))


@settings(max_examples=400, deadline=None)
@given(
    gemm_type=st.sampled_from(list(sm90.GemmType)),
    is_fp8=st.booleans(),
    m=st.integers(1, 70) | st.integers(1, 16384) | st.integers(1, 131072),
    n=st.integers(1, 512).map(lambda x: 64 * x),
    k=st.integers(1, 128).map(lambda x: 128 * x),
    groups=st.sampled_from([1, 4, 32, 256]),
    num_sms=st.sampled_from([132, 131, 112, 78, 20, 1]),
)
def test_best_layout_is_the_first_cheapest_by_the_librarys_cost(
    gemm_type: sm90.GemmType,
    is_fp8: bool,
    m: int,
    n: int,
    k: int,
    groups: int,
    num_sms: int,
) -> None:
    groups = 1 if gemm_type is sm90.GemmType.NORMAL else groups
    desc = sm90.GemmDesc(gemm_type, is_fp8, n, k, groups, num_sms)
    candidates = sm90.legal_layouts(desc, m)
    best = min(candidates, key=lambda layout: library_cycles(desc, layout, m))
    assert sm90.best_layout(desc, m) == best


@pytest.mark.parametrize(
    ("given_ranges", "expected"),
    [
        ([], ()),
        ([((1, 4),), ((5, 9),)], ((1, 9),)),
        ([((1, 4), (8, 9)), ((3, 5),)], ((1, 5), (8, 9))),
        ([((7, 7),), ((1, 20),)], ((1, 20),)),
    ],
)
def test_union_of_m_ranges(given_ranges: list[Any], expected: Any) -> None:
    assert union(given_ranges) == expected


def test_plan_lists_a_shared_kernel_once_with_all_m() -> None:
    wide = GemmShape(T.GEMM_NT_F8F8BF16, 4096, 1024, 1, 132)
    both = make_plan([Demand(wide, (1,), (0,)), Demand(wide, (5000,), (0,))], RULES)
    alone = make_plan([Demand(wide, (1, 5000), (0, 1))], RULES)
    assert {item.kernel for item in both.kernels} == {item.kernel for item in alone.kernels}
    transpose = next(item for item in both.kernels if item.kernel.name == "transpose_fp32")
    assert transpose.m_ranges == ((1, 1), (5000, 5000))
    assert alone.kernels[0].stages == (0, 1)


def test_uncovered_lists_m_of_missing_kernels() -> None:
    shape = GemmShape(T.GEMM_NT_F8F8BF16, 4096, 1024, 1, 132)
    plan = make_plan([Demand(shape, range(1, 65))], RULES)
    tail = kernels_of(shape.call(64))[-1]
    (gap,) = plan.uncovered({item.kernel for item in plan.kernels} - {tail}, (0,))
    assert (gap.shape, gap.m_ranges) == (shape, ((33, 64),))
    assert plan.uncovered({item.kernel for item in plan.kernels}, (0,)) == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gemm:1:1", "type 'gemm' is not known: use one of gemm_nt_f8f8bf16, "),
        ("gemm_nt_f8f8bf16:4096", "must be TYPE:N:K or TYPE:N:K:GROUPS with whole numbers"),
        ("gemm_nt_f8f8bf16:4096:x", "must be TYPE:N:K or TYPE:N:K:GROUPS with whole numbers"),
        ("gemm_nt_f8f8bf16:4096:1024:1:1", "must be TYPE:N:K or TYPE:N:K:GROUPS"),
        ("gemm_nt_f8f8bf16:0:1024", "N and K must lie in 1.."),
        ("gemm_nt_f8f8bf16:64:128:0", "GROUPS must be at least 1"),
    ],
)
def test_invalid_gemm_spec_is_a_one_line_error(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        gemm_demands(spec, max_m=16384, num_sms=132)
    assert message in str(caught.value)


@pytest.mark.parametrize("values", [{"max_m": 0, "num_sms": 132}, {"max_m": 1, "num_sms": 0}])
def test_max_m_and_num_sms_out_of_range_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must lie in"):
        gemm_demands("gemm_nt_f8f8bf16:64:128", **values)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tf32_hc_prenorm_gemm:1024:4096", "n must be a multiple of 8 up to 32"),
        ("paged_mqa_logits_metadata:1:1", "at most 58112 fit"),
        ("fp8_mqa_logits:16:128", "heads must be one of (32, 64)"),
        ("gemm_nt_f8f8bf16:64:33554432", "its tiles do not fit in shared memory"),
    ],
)
def test_shape_without_a_kernel_is_a_one_line_error(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(gemm_demands(spec, max_m=60000, num_sms=132), RULES)
    assert message in str(caught.value)


def test_hyper_connection_gemm_with_a_fixed_number_of_splits() -> None:
    (only,) = gemm_demands("tf32_hc_prenorm_gemm:24:16384:16", max_m=100, num_sms=132)
    assert only.shape.num_groups == 16
    assert make_plan([only], RULES).kernels[0].m_ranges == ((1, 100),)
    (none,) = gemm_demands("tf32_hc_prenorm_gemm:24:16384:0", max_m=100, num_sms=132)
    assert none.shape.num_groups == 0


WORDS = {
    T.GEMM_NT_F8F8BF16: "tile 64x16x128, 16 stages, 132 SMs",
    T.GROUPED_GEMM_NT_F8F8BF16_CONTIG: (
        "tile 128x16x128, 12 stages, 4 groups, n 1024 k 4096, 132 SMs"
    ),
    T.GEMM_NT_BF16BF16F32: "tile 64x16x64, 16 stages, fp32 out, 132 SMs",
    T.TF32_HC_PRENORM_GEMM: "n 24 k 16384, 4 splits",
    T.PAGED_MQA_LOGITS_METADATA: "128 rows, 132 SMs",
    T.FP8_MQA_LOGITS: "64 heads of 128",
}


@pytest.mark.parametrize("kind", sorted(RULED_TYPES), ids=lambda kind: kind.name)
def test_kernel_configuration_in_words(kind: T) -> None:
    sizes = {"n": 1024, "k": 4096}
    if kind is T.TF32_HC_PRENORM_GEMM:
        sizes = {"n": 24, "k": 16384}
    elif "LOGITS" in kind.name:
        sizes = {"n": 64, "k": 128}
    for kernel in kernels_of(KernelCall(kind, m=128, num_groups=4, num_sms=132, **sizes)):
        config = config_of(kernel)
        assert config and config == config_of_source(kernel.body)
        if kernel.name == "transpose_fp32":
            assert in_words(config) == "32 scales a row"
        elif kind in WORDS:
            assert in_words(config) == WORDS[kind]
