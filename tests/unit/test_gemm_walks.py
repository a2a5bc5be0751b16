"""GEMM walks: lists of M, the hook that starts a walk at a first call, and memory limits."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.backend.gemm_walks import (
    GIB,
    HOOKED_TYPES,
    ExecutionHook,
    fast_m_list,
    full_m_list,
    relax_m_list,
    relaxed_ms,
    walk_bytes,
)
from runner.backend.token_to_m import hc_num_splits
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape, KernelCall, expand, steps_of
from runner.schedule import Walk

DENSE = GemmShape(T.GEMM_NT_F8F8BF16, 4096, 2048, 1, 132)
CONTIGUOUS = GemmShape(T.GROUPED_GEMM_NT_F8F8BF16_CONTIG, 4096, 2048, 8, 132)
HC = GemmShape(T.TF32_HC_PRENORM_GEMM, 24, 16384, 8, 132)
UPTO = range(1, 16385)

# -- lists of M -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunked", "last"),
    [
        (-1, 65536),
        (0, 65536),
        (1, 16384),
        (8192, 16384),
        (8193, 16386),
        (16384, 32768),
        (65536, 131072),
        (100000, 131072),
    ],
)
def test_full_m_list_depends_on_chunk_size(chunked: int, last: int) -> None:
    assert full_m_list(chunked) == range(1, last + 1)


def sglang_fast_list(chunked: int) -> list[int]:
    """SGLang 0.5.23's algorithm, step by step.

    An octave is sampled to its end, even if the largest prefill lies within it.
    """
    ms = list(range(1, 1024 + 1))
    largest = 16 * 1024 if chunked < 1 else min(chunked, 32 * 1024)
    octave, step = 1024, 2
    while octave < largest:
        ms += list(range(octave, octave * 2, step))
        octave, step = octave * 2, step * 2
    ms.append(largest)
    return sorted(set(ms))


@given(st.integers(-1, 200000) | st.sampled_from([2**n + d for n in range(18) for d in (-1, 0, 1)]))
def test_fast_m_list_equals_sglangs(chunked: int) -> None:
    assert list(fast_m_list(chunked)) == sglang_fast_list(chunked)


def test_relax_m_list_has_powers_multiples_and_full_waves() -> None:
    listed = relax_m_list(300, 32, 132)
    assert listed[:11] == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert set(range(64, 301, 64)) <= set(listed)
    assert listed[-1] <= 300
    # One wave of 64-row blocks over 256 columns of 16: 132 * 64 // 16 = 528 rows.
    assert 528 in relax_m_list(16384, 256, 132)


def test_relax_applies_to_dense_and_contiguous_gemms_only() -> None:
    ms = range(128, 8193, 128)
    assert relaxed_ms(CONTIGUOUS, ms, 4096) == ms
    assert relaxed_ms(DENSE, range(1, 4097), 4096) == relax_m_list(4096, 4096, 132)
    for kind in set(T) - {DENSE.type, CONTIGUOUS.type}:
        assert relaxed_ms(GemmShape(kind, 4096, 2048, 1, 132), range(1, 4097), 4096) == ()


# -- steps ----------------------------------------------------------------------------------------


def test_steps_of_compress_a_list_of_m() -> None:
    assert steps_of(()) == steps_of(range(0)) == ()
    assert steps_of([7]) == ((7, 7, 1),)
    assert steps_of(range(128, 1000, 128)) == ((128, 896, 128),)
    assert steps_of([1, 2, 3, 5, 7, 100]) == ((1, 3, 1), (5, 7, 2), (100, 100, 1))
    # 2560 values (1..1024 and three octaves) as a Schedule holds them.
    assert steps_of(fast_m_list(8192)) == (
        (1, 1024, 1),
        (1026, 2048, 2),
        (2052, 4096, 4),
        (4104, 8192, 8),
    )


@given(st.sets(st.integers(1, 10**6), max_size=60).map(sorted))
def test_steps_hold_exactly_the_values(values: list[int]) -> None:
    assert list(expand(steps_of(values))) == values


# -- the execution hook ---------------------------------------------------------------------------


def test_gemm_is_walked_at_its_first_call_only() -> None:
    hook = ExecutionHook(UPTO)
    assert hook.before(DENSE.call(5)) == (Walk(DENSE, ((1, 16384, 1),)),)
    assert hook.before(DENSE.call(5)) == hook.before(DENSE.call(7)) == ()


def test_walks_happen_only_with_a_list_and_on_the_node_leader() -> None:
    for hook in (ExecutionHook(), ExecutionHook(UPTO, is_node_leader=False)):
        assert hook.before(DENSE.call(5)) == hook.before(HC.call(5)) == ()


def test_gemm_types_that_are_not_walked() -> None:
    others = set(T) - HOOKED_TYPES
    assert others == {
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
    for kind in others:
        assert ExecutionHook(UPTO).before(KernelCall(kind, 8, 64, 128, 1, 132)) == ()


def test_contiguous_gemm_is_walked_with_multiples_of_128_rows() -> None:
    assert ExecutionHook(range(1, 1025)).before(CONTIGUOUS.call(128)) == (
        Walk(CONTIGUOUS, ((128, 1024, 128),)),
    )
    ragged = (1, 127, 128, 200, 256, 640)
    assert ExecutionHook(ragged).before(CONTIGUOUS.call(128)) == (
        Walk(CONTIGUOUS, ((128, 256, 128), (640, 640, 1))),
    )
    assert ExecutionHook(range(1, 128)).before(CONTIGUOUS.call(128)) == ()


def test_hyper_connection_gemm_is_walked_once_per_number_of_splits() -> None:
    hook = ExecutionHook(UPTO)
    walks = hook.before(HC.call(5))
    firsts: dict[int, int] = {}
    for m in UPTO:
        firsts.setdefault(hc_num_splits(m, HC.k, 132), m)
    # 132 SMs over 1, 2, ... blocks of 64 rows, at most 16384 / 64 / 4 splits.
    assert list(firsts.items())[:5] == [(64, 1), (44, 129), (33, 193), (26, 257), (22, 321)]
    assert walks == tuple(
        Walk(GemmShape(HC.type, HC.n, HC.k, splits, HC.num_sms), ((m, m, 1),))
        for splits, m in firsts.items()
    )
    # A different number of splits does not make it a new GEMM.
    assert hook.before(GemmShape(HC.type, HC.n, HC.k, 1, 132).call(9000)) == ()
    assert len(hook.before(GemmShape(HC.type, HC.n, 2048, 8, 132).call(5))) > 1


def walked(budget: float, ms: Sequence[int]) -> tuple[Sequence[int], list[str]]:
    warnings: list[str] = []
    hook = ExecutionHook(ms, budget=lambda: budget, warn=warnings.append)
    (walk,) = hook.before(DENSE.call(1))
    return list(expand(walk.steps)), warnings


def test_walk_that_fits_in_memory_is_complete() -> None:
    assert walked(walk_bytes(DENSE, 16384), UPTO) == (list(UPTO), [])


@pytest.mark.parametrize(
    ("budget", "last", "most"),
    [
        (walk_bytes(DENSE, 16384) - 1, 16384, 8192),
        (walk_bytes(DENSE, 8192), 16384, 8192),
        (walk_bytes(DENSE, 8192) - 1, 16384, 4096),
        # M is halved only while it is above 2048; below that the walk runs anyway.
        (walk_bytes(DENSE, 2048) - 1, 16384, 2048),
        (0, 2049, 1024),
        (0, 3001, 1500),
        (0, 2048, 2048),
        (0, 64, 64),
    ],
)
def test_largest_m_of_a_walk_is_halved_until_it_fits(budget: int, last: int, most: int) -> None:
    found, warnings = walked(budget, range(1, last + 1))
    assert found == list(range(1, most + 1))
    assert warnings == [
        f"a walk of gemm_nt_f8f8bf16:4096:2048 needs {walk_bytes(DENSE, last) / GIB:.1f} GiB of "
        f"GPU memory, but {budget / GIB:.1f} GiB are free: its largest M is {most} instead of "
        f"{last}"
    ]


def test_free_memory_is_queried_once_per_walk() -> None:
    asked: list[int] = []

    def budget() -> float:
        asked.append(1)
        return float("inf")

    hook = ExecutionHook(UPTO, budget=budget)
    for shape in (DENSE, DENSE, CONTIGUOUS, DENSE, CONTIGUOUS):
        hook.before(shape.call(128))
    assert len(asked) == 2


# -- memory ---------------------------------------------------------------------------------------

Buffer = tuple[int, tuple[int, ...]]
"""Bytes per element, and the shape."""


def blocks(size: int) -> int:
    return -(-size // 128)


def buffers(kind: T, m: int, n: int, k: int, groups: int) -> list[Buffer]:
    """The buffers that SGLang's warm-up of a GEMM type allocates."""
    padded = -(-m // 4) * 4
    scales = (blocks(n), blocks(k))
    rows: list[Buffer] = [(1, (m, k)), (4, (m, blocks(k))), (4, (padded, blocks(k)))]
    experts: list[Buffer] = [(1, (groups, n, k)), (4, (groups, *scales))]
    splits = max(groups, 1)
    found: dict[T, list[Buffer]] = {
        T.GEMM_NT_F8F8BF16: [*rows, (1, (n, k)), (4, scales), (2, (m, n))],
        T.GROUPED_GEMM_NT_F8F8BF16_CONTIG: [*rows, *experts, (4, (m,)), (2, (m, n))],
        T.GROUPED_GEMM_NT_F8F8BF16_MASKED: [
            *((each, (groups, *shape)) for each, shape in rows),
            *experts,
            (4, (groups,)),
            (2, (groups, m, n)),
        ],
        T.GEMM_NT_BF16BF16F32: [(2, (m, k)), (2, (n, k)), (4, (m, n))],
        T.GROUPED_GEMM_NT_BF16_CONTIG: [(2, (m, k)), (2, (groups, n, k)), (4, (m,)), (2, (m, n))],
        T.GROUPED_GEMM_NT_BF16_MASKED: [
            (2, (groups, m, k)),
            (2, (groups, n, k)),
            (4, (groups,)),
            (2, (groups, m, n)),
        ],
        T.TF32_HC_PRENORM_GEMM: [(2, (m, k)), (4, (n, k)), (4, (splits, m, n)), (4, (splits, m))],
    }
    return found[kind]


size = st.integers(1, 20000)


@pytest.mark.parametrize("kind", sorted(HOOKED_TYPES))
@given(m=size, n=size, k=size, groups=st.integers(0, 300))
def test_walk_bytes_is_the_sum_of_its_buffers(kind: T, m: int, n: int, k: int, groups: int) -> None:
    expected = sum(each * prod(shape) for each, shape in buffers(kind, m, n, k, groups))
    assert walk_bytes(GemmShape(kind, n, k, groups, 132), m) == expected
