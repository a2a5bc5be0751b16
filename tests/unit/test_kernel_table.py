"""Recorded kernel tables: look-ups, unknown GEMMs and M, and merging."""

from dataclasses import replace
from itertools import groupby, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import UserError
from runner.kernels.kernel import Kernel
from runner.kernels.rules import RULES, kernels_of
from runner.kernels.table import Demand, Run, Source, merge_tables
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape
from tests.unit.kernel_tables import (
    DENSE,
    GROUPED,
    ORIGIN,
    RECIPE,
    A,
    B,
    C,
    Runs,
    table,
    values,
)

KNOWN = table([(1, 16, (A,)), (17, 32, (A, B)), (33, 40, ()), (60, 64, (A,))])


def refusal(m: int, shape: GemmShape = DENSE) -> str:
    return (
        f"no table of dg 1 on b200 has {shape.describe()} with M {m} on {shape.num_sms} SMs: ask "
        "the library itself (--library, where it is installed with a CUDA build of torch)"
    )


@pytest.mark.parametrize(
    ("ms", "parts"),
    [
        ((), []),
        ((16, 17), [((A,), 0, 1), ((A, B), 1, 2)]),
        (range(1, 41), [((A,), 0, 16), ((A, B), 16, 32), ((), 32, 40)]),
        ((3, 5, 36, 61, 64), [((A,), 0, 2), ((), 2, 3), ((A,), 3, 5)]),
        ((2, 62), [((A,), 0, 2)]),
    ],
)
def test_parts_groups_consecutive_m_with_the_same_kernels(
    ms: tuple[int, ...], parts: list[tuple[tuple[Kernel, ...], int, int]]
) -> None:
    assert KNOWN.parts(DENSE, ms) == parts


@pytest.mark.parametrize(
    ("ms", "unknown"),
    [((41,), 41), ((0, 1), 0), ((1, 45, 62), 45), ((64, 65), 65), (range(30, 70), 41)],
)
def test_unknown_m_is_refused(ms: tuple[int, ...], unknown: int) -> None:
    with pytest.raises(UserError) as caught:
        KNOWN.parts(DENSE, ms)
    assert str(caught.value) == refusal(unknown)


def test_unknown_gemm_is_refused() -> None:
    for shape in (GROUPED, GemmShape(DENSE.type, 4096, 1024, 1, 132)):
        with pytest.raises(UserError) as caught:
            KNOWN.parts(shape, (1, 2))
        assert str(caught.value) == refusal(1, shape)
        assert KNOWN.parts(shape, ()) == []


def test_kernels_of_returns_the_kernels_of_a_call() -> None:
    calls = {m: KNOWN.kernels_of(DENSE.call(m)) for m in (0, 1, 17, 17, 40, 64)}
    assert calls == {0: (), 1: (A,), 17: (A, B), 40: (), 64: (A,)}
    with pytest.raises(UserError) as caught:
        KNOWN.kernels_of(GROUPED.call(128))
    assert str(caught.value) == refusal(128, GROUPED)


def test_kernel_ranges_lists_m_ranges_of_each_kernel() -> None:
    assert KNOWN.kernel_ranges(DENSE, (1, 16, 20, 36, 61, 64)) == {
        A: ((1, 20), (61, 64)),
        B: ((20, 20),),
    }
    assert KNOWN.kernel_ranges(DENSE, ()) == {}
    twice = table([(1, 4, (A, B, A))])
    assert twice.kernel_ranges(DENSE, (1, 4)) == {A: ((1, 4),), B: ((1, 4),)}


def test_table_returns_itself_without_asking_for_demands() -> None:
    def never() -> list[Demand]:
        raise AssertionError("demands were asked for")

    assert KNOWN.table(never) is KNOWN
    assert RULES.table(never) is RULES


def test_origin_description() -> None:
    assert ORIGIN.describe() == "dg 1 (JIT 2), b200 (148 SMs, sm_100f), asked on a stand-in GPU"
    recorded = replace(ORIGIN, source=Source.RECORDED)
    assert recorded.describe().endswith(", recorded on a stand-in GPU")
    assert RULES.origin.describe() == (
        "sgl-deep-gemm 0.1.4.post1 (JIT 1), h200 (132 SMs, sm_90a), by our rules"
    )


def test_header_hash_comes_from_the_table() -> None:
    made = replace(KNOWN, headers={"deep_gemm/a.cuh": "0f"})
    assert made.header_hash("deep_gemm/a.cuh") == "0f"
    with pytest.raises(KeyError):
        made.header_hash("deep_gemm/b.cuh")


# -- against a list of every M --------------------------------------------------------------------

LAST = 30
choices = st.sampled_from([(), (A,), (A, B), (B, C), None])


def runs_of(each: list[tuple[Kernel, ...] | None]) -> Runs:
    """Runs from a list with the kernels of M = 1, 2, ...; None is an unknown M."""
    found, m = [], 1
    for kernels, alike in groupby(each):
        count = len(list(alike))
        if kernels is not None:
            found.append((m, m + count - 1, kernels))
        m += count
    return found


@given(
    st.lists(choices, min_size=LAST, max_size=LAST),
    st.sets(st.integers(1, LAST)).map(sorted).map(tuple),
)
def test_parts_kernels_and_ranges_agree_with_each_m(
    each: list[tuple[Kernel, ...] | None], ms: tuple[int, ...]
) -> None:
    made = table(runs_of(each))
    unknown = [m for m in ms if each[m - 1] is None]
    assert made.lacking(Demand(DENSE, ms)) == unknown
    assert made.lacking(Demand(GROUPED, ms)) == list(ms)
    if unknown:
        with pytest.raises(UserError) as caught:
            made.parts(DENSE, ms)
        assert str(caught.value) == refusal(unknown[0])
        return
    parts = made.parts(DENSE, ms)
    assert [kernels for kernels, low, high in parts for _ in ms[low:high]] == [
        each[m - 1] for m in ms
    ]
    assert [made.kernels_of(DENSE.call(m)) for m in ms] == [each[m - 1] for m in ms]
    assert all(one[0] != two[0] for one, two in pairwise(parts)), "neighbouring parts differ"
    assert {
        kernel: [m for m in ms if any(a <= m <= b for a, b in pairs)]
        for kernel, pairs in made.kernel_ranges(DENSE, ms).items()
    } == {
        kernel: [m for m in ms if kernel in (each[m - 1] or ())]
        for kernel in dict.fromkeys(k for m in ms for k in each[m - 1] or ())
    }


@given(
    st.sampled_from([T.GEMM_NT_F8F8BF16, T.PAGED_MQA_LOGITS_METADATA, T.FP8_EINSUM_BHR_HDR_BHD]),
    st.sets(st.integers(1, 400), min_size=1, max_size=60).map(sorted).map(tuple),
)
def test_table_recorded_from_rules_gives_the_same_answers(kind: T, ms: tuple[int, ...]) -> None:
    shape = GemmShape(kind, 1024, 4096, 4, 132)
    recorded = table([(m, m, kernels_of(shape.call(m))) for m in ms], shape)
    assert recorded.parts(shape, ms) == RULES.parts(shape, ms)
    assert recorded.kernel_ranges(shape, ms) == RULES.kernel_ranges(shape, ms)


# -- merging --------------------------------------------------------------------------------------


def test_merge_tables_joins_adjacent_runs_and_headers() -> None:
    one = replace(table([(1, 16, (A,)), (40, 48, (B,))]), headers={"a": "1"})
    two = replace(table([(17, 39, (A,)), (49, 60, (C,))]), headers={"b": "2"})
    three = table([(128, 256, (C,)), (384, 384, (C,))], GROUPED)
    assert values(merge_tables(merge_tables(one, two), three)) == (
        ORIGIN,
        RECIPE,
        {
            DENSE: (Run(1, 39, (A,)), Run(40, 48, (B,)), Run(49, 60, (C,))),
            GROUPED: (Run(128, 384, (C,)),),
        },
        {"a": "1", "b": "2"},
    )
    assert dict(one.runs) == {DENSE: (Run(1, 16, (A,)), Run(40, 48, (B,)))}, "unchanged"


@given(st.lists(st.sampled_from([(A,), (B, C), ()]), min_size=12, max_size=12), st.data())
def test_merging_overlapping_pieces_restores_the_table(
    each: list[tuple[Kernel, ...]], data: st.DataObject
) -> None:
    pieces: list[Runs] = [[], []]
    for m, kernels in enumerate(each, 1):
        for piece in data.draw(st.sampled_from([(0,), (1,), (0, 1)])):
            pieces[piece].append((m, m, kernels))
    made = merge_tables(table(pieces[0]), table(pieces[1]))
    assert dict(made.runs) == {DENSE: tuple(Run(*run) for run in runs_of(list(each)))}


@pytest.mark.parametrize(
    "runs",
    [
        [(1, 1, (A,)), (1, 1, (A,))],
        [(1, 30, (A,)), (10, 12, (A,))],
        [(1, 16, (A,)), (10, 30, (A,))],
    ],
    ids=["equal", "inside", "across"],
)
def test_overlapping_tables_with_equal_kernels_merge(runs: Runs) -> None:
    made = merge_tables(*(table([run]) for run in runs))
    assert made.runs[DENSE] == (Run(1, max(last for _, last, _ in runs), (A,)),)
