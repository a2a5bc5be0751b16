"""Walks at first calls: which, on which ranks, over which M, and within which memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.backend.gemm_walks import HOOKED_TYPES, ExecutionHook, relaxed_ms
from runner.backend.m_lists import expand, relax_m_list
from runner.backend.token_to_m import hc_num_splits
from runner.backend.walk_memory import GIB, walk_bytes
from runner.kernels.types import CONTIGUOUS_TYPES, GemmShape, KernelCall
from runner.kernels.types import DeepGemmKernelType as T
from runner.schedule import Walk

DENSE = GemmShape(T.GEMM_NT_F8F8BF16, 4096, 2048, 1, 132)
CONTIGUOUS = GemmShape(T.GROUPED_GEMM_NT_F8F8BF16_CONTIG, 4096, 2048, 8, 132)
HC = GemmShape(T.TF32_HC_PRENORM_GEMM, 24, 16384, 8, 132)
UPTO = range(1, 16385)


def test_a_key_is_walked_at_its_first_call_only() -> None:
    hook = ExecutionHook(UPTO)
    assert hook.before(DENSE.call(5)) == (Walk(DENSE, ((1, 16384, 1),)),)
    assert hook.before(DENSE.call(5)) == hook.before(DENSE.call(7)) == ()


@pytest.mark.parametrize(
    "other",
    [
        GemmShape(T.GEMM_NT_BF16BF16F32, 4096, 2048, 1, 132),
        GemmShape(T.GEMM_NT_F8F8BF16, 4224, 2048, 1, 132),
        GemmShape(T.GEMM_NT_F8F8BF16, 4096, 4096, 1, 132),
        GemmShape(T.GEMM_NT_F8F8BF16, 4096, 2048, 2, 132),
    ],
    ids=["type", "n", "k", "groups"],
)
def test_each_key_is_walked(other: GemmShape) -> None:
    hook = ExecutionHook(UPTO)
    assert [walk.shape for walk in hook.before(DENSE.call(5))] == [DENSE]
    assert [walk.shape for walk in hook.before(other.call(5))] == [other]
    assert hook.before(DENSE.call(9)) == hook.before(other.call(9)) == ()


def test_the_number_of_sms_is_no_part_of_the_key() -> None:
    hook = ExecutionHook(UPTO)
    hook.before(DENSE.call(5))
    assert hook.before(KernelCall(DENSE.type, 5, DENSE.n, DENSE.k, 1, 100)) == ()


def test_without_a_list_or_a_lead_nothing_is_walked() -> None:
    for hook in (ExecutionHook(), ExecutionHook(UPTO, leads=False)):
        assert hook.before(DENSE.call(5)) == hook.before(HC.call(5)) == ()


def test_a_call_of_no_rows_walks_nothing_and_is_no_first_call() -> None:
    hook = ExecutionHook(UPTO)
    assert hook.before(DENSE.call(0)) == ()
    assert hook.before(DENSE.call(1)) == (Walk(DENSE, ((1, 16384, 1),)),)


@pytest.mark.parametrize("kind", sorted(set(T) - HOOKED_TYPES))
def test_other_types_are_not_walked(kind: T) -> None:
    assert ExecutionHook(UPTO).before(KernelCall(kind, 8, 64, 128, 1, 132)) == ()


def test_the_types_that_are_not_walked() -> None:
    assert set(T) - HOOKED_TYPES == {
        T.GEMM_NT_BF16BF16BF16,
        T.FP8_EINSUM_BHR_HDR_BHD,
        T.FP8_MQA_LOGITS,
        T.PAGED_MQA_LOGITS_METADATA,
        T.FP8_PAGED_MQA_LOGITS,
        T.GEMM_NT_F8F8BF16_BLOCK32,
        T.GEMM_NT_F8F4BF16,
        T.GROUPED_GEMM_NT_F8F4BF16_CONTIG,
        T.GROUPED_GEMM_NT_F8F4BF16_MASKED,
    }


def test_a_contiguous_gemm_is_walked_with_whole_blocks() -> None:
    assert ExecutionHook(range(1, 1025)).before(CONTIGUOUS.call(128)) == (
        Walk(CONTIGUOUS, ((128, 1024, 128),)),
    )
    ragged = [1, 127, 128, 200, 256, 640]
    assert ExecutionHook(ragged).before(CONTIGUOUS.call(128)) == (
        Walk(CONTIGUOUS, ((128, 256, 128), (640, 640, 1))),
    )
    assert ExecutionHook(range(1, 128)).before(CONTIGUOUS.call(128)) == ()


def test_each_number_of_splits_is_walked_once() -> None:
    hook = ExecutionHook(UPTO)
    walks = hook.before(HC.call(5))
    firsts: dict[int, int] = {}
    for m in UPTO:
        firsts.setdefault(hc_num_splits(m, HC.k, 132), m)
    # 132 SMs over 1, 2, ... blocks of 64 rows, at most 16384 / 64 / 4 splits.
    assert list(firsts.items())[:5] == [(64, 1), (44, 129), (33, 193), (26, 257), (22, 321)]
    assert [(walk.shape.num_groups, walk.steps) for walk in walks] == [
        (splits, ((m, m, 1),)) for splits, m in firsts.items()
    ]
    assert {(w.shape.type, w.shape.n, w.shape.k, w.shape.num_sms) for w in walks} == {
        (HC.type, HC.n, HC.k, HC.num_sms)
    }
    # Another number of splits is the same key.
    assert hook.before(GemmShape(HC.type, HC.n, HC.k, 1, 132).call(9000)) == ()
    other = GemmShape(HC.type, HC.n, 2048, 8, 132)
    assert len(hook.before(other.call(5))) > 1


def test_splits_end_with_the_list() -> None:
    walks = ExecutionHook(range(1, 200)).before(HC.call(5))
    assert [walk.shape.num_groups for walk in walks] == [64, 44, 33]


def walked(budget: float, ms: Sequence[int]) -> tuple[Sequence[int], list[str]]:
    told: list[str] = []
    (walk,) = ExecutionHook(ms, budget=lambda: budget, warn=told.append).before(DENSE.call(1))
    return expand(walk.steps), told


def test_a_walk_that_fits_is_whole() -> None:
    assert walked(walk_bytes(DENSE, 16384), UPTO) == (list(UPTO), [])


@pytest.mark.parametrize(
    ("budget", "last", "most"),
    [
        (walk_bytes(DENSE, 16384) - 1, 16384, 8192),
        (walk_bytes(DENSE, 8192), 16384, 8192),
        (walk_bytes(DENSE, 8192) - 1, 16384, 4096),
        # It halves while it is above 2048, and then is tried all the same.
        (walk_bytes(DENSE, 2048) - 1, 16384, 2048),
        (0, 16384, 2048),
        (0, 2049, 1024),
        (0, 3001, 1500),
        (0, 2048, 2048),
        (0, 64, 64),
    ],
)
def test_the_largest_m_halves_until_it_fits(budget: int, last: int, most: int) -> None:
    found, told = walked(budget, range(1, last + 1))
    assert found == list(range(1, most + 1))
    wanted = f"{walk_bytes(DENSE, last) / GIB:.1f}"
    assert told == [
        f"a walk of gemm_nt_f8f8bf16:4096:2048 wants {wanted} GiB of GPU memory and "
        f"{budget / GIB:.1f} are free: its largest M is {most} instead of {last}"
    ]


def test_the_words_of_a_cut_walk() -> None:
    told: list[str] = []
    masked = GemmShape(T.GROUPED_GEMM_NT_F8F8BF16_MASKED, 4096, 2048, 32, 132)
    hook = ExecutionHook(UPTO, budget=lambda: 2.25 * GIB, warn=told.append)
    (walk,) = hook.before(masked.call(1))
    assert walk.steps == ((1, 4096, 1),)
    assert told == [
        "a walk of grouped_gemm_nt_f8f8bf16_masked:4096:2048:32 wants 5.3 GiB of GPU memory and "
        "2.2 are free: its largest M is 4096 instead of 16384"
    ]


def test_memory_is_asked_for_before_each_walk_only() -> None:
    asked: list[int] = []

    def budget() -> float:
        asked.append(1)
        return float("inf")

    hook = ExecutionHook(UPTO, budget=budget)
    for shape in (DENSE, DENSE, CONTIGUOUS, DENSE, CONTIGUOUS):
        hook.before(shape.call(128))
    assert len(asked) == 2


shapes = st.builds(
    GemmShape,
    st.sampled_from(sorted(T)),
    st.sampled_from([24, 32]),
    st.sampled_from([512, 2048]),
    st.sampled_from([1, 2]),
    st.sampled_from([78, 132]),
)
calls = st.lists(st.tuples(shapes, st.integers(0, 300)), max_size=12)
lists = st.sets(st.integers(1, 6000), min_size=1, max_size=40).map(sorted)


@given(calls, lists, st.floats(0, 4e7))
def test_every_key_is_walked_once_within_the_list(
    made: list[tuple[GemmShape, int]], m_list: list[int], budget: float
) -> None:
    told: list[str] = []
    hook = ExecutionHook(m_list, budget=lambda: budget, warn=told.append)
    seen: set[tuple[T, int, int, int]] = set()
    warnings = 0
    for shape, m in made:
        walks = hook.before(shape.call(m))
        is_hc = shape.type is T.TF32_HC_PRENORM_GEMM
        key = (shape.type, shape.n, shape.k, 0 if is_hc else shape.num_groups)
        if m == 0 or shape.type not in HOOKED_TYPES or key in seen:
            assert walks == ()
            continue
        seen.add(key)
        if is_hc:
            splits = [hc_num_splits(m, shape.k, shape.num_sms) for m in range(1, m_list[-1] + 1)]
            assert [walk.shape.num_groups for walk in walks] == list(dict.fromkeys(splits))
            continue
        step = 128 if shape.type in CONTIGUOUS_TYPES else 1
        ms = [m for m in m_list if m % step == 0]
        most = ms[-1] if ms else 0
        warnings += bool(ms) and walk_bytes(shape, most) > budget
        while ms and walk_bytes(shape, most) > budget and most > 2048:
            most //= 2
        allowed = ms[: bisect_right(ms, most)]
        assert [(w.shape, expand(w.steps)) for w in walks] == [(shape, allowed)] * bool(allowed)
    assert len(told) == warnings


def test_what_relax_walks() -> None:
    ms = range(128, 8193, 128)
    assert relaxed_ms(CONTIGUOUS, ms, 4096) == ms
    assert relaxed_ms(DENSE, range(1, 4097), 4096) == relax_m_list(4096, 4096, 132)
    for kind in set(T) - {DENSE.type, CONTIGUOUS.type}:
        assert relaxed_ms(GemmShape(kind, 4096, 2048, 1, 132), range(1, 4097), 4096) == ()
