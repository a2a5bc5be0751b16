"""Tables of kernels: what they know, and what they refuse."""

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import UserError
from runner.kernels.kernel import Kernel
from runner.kernels.rules import RULES
from runner.kernels.rules_sm90 import kernels_of
from runner.kernels.table import Demand, Run, Source, cut_at, join_runs
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape
from tests.unit.kernel_tables import DENSE, GROUPED, ORIGIN, A, B, C, Runs, table

KNOWN = table([(1, 16, (A,)), (17, 32, (A, B)), (33, 40, ()), (60, 64, (A,))])


@pytest.mark.parametrize(
    ("ms", "parts"),
    [
        ((), []),
        ((1,), [((A,), 0, 1)]),
        ((16, 17), [((A,), 0, 1), ((A, B), 1, 2)]),
        (range(1, 41), [((A,), 0, 16), ((A, B), 16, 32), ((), 32, 40)]),
        ((3, 5, 36, 61, 64), [((A,), 0, 2), ((), 2, 3), ((A,), 3, 5)]),
        ((2, 62), [((A,), 0, 2)]),
    ],
)
def test_parts(ms: tuple[int, ...], parts: list[tuple[tuple[Kernel, ...], int, int]]) -> None:
    assert KNOWN.parts(DENSE, ms) == parts


def refusal(m: int, shape: GemmShape = DENSE) -> str:
    return (
        f"no table of dg 1 on b200 has {shape.describe()} with M {m} on {shape.num_sms} SMs: ask "
        "the library itself (--library, where it is installed with a CUDA build of torch)"
    )


@pytest.mark.parametrize(
    ("ms", "unknown"),
    [
        ((41,), 41),
        ((0, 1), 0),
        ((1, 50), 50),
        ((1, 45, 62), 45),
        ((64, 65), 65),
        (range(30, 70), 41),
    ],
)
def test_an_m_that_is_not_known(ms: tuple[int, ...], unknown: int) -> None:
    with pytest.raises(UserError) as caught:
        KNOWN.parts(DENSE, ms)
    assert str(caught.value) == refusal(unknown)


def test_a_gemm_that_is_not_known() -> None:
    for shape in (GROUPED, GemmShape(DENSE.type, 4096, 1024, 1, 132)):
        with pytest.raises(UserError) as caught:
            KNOWN.parts(shape, (1, 2))
        assert str(caught.value) == refusal(1, shape)
        assert KNOWN.parts(shape, ()) == []


def test_kernels_of_a_call() -> None:
    calls = {m: KNOWN.kernels_of(DENSE.call(m)) for m in (0, 1, 16, 17, 40, 64)}
    assert calls == {0: (), 1: (A,), 16: (A,), 17: (A, B), 40: (), 64: (A,)}
    assert KNOWN.kernels_of(DENSE.call(17)) == (A, B), "and again"
    for call, words in (
        (DENSE.call(41), refusal(41)),
        (GROUPED.call(128), refusal(128, GROUPED)),
    ):
        with pytest.raises(UserError) as caught:
            KNOWN.kernels_of(call)
        assert str(caught.value) == words


def test_ranges_of_kernels() -> None:
    assert KNOWN.kernel_ranges(DENSE, range(1, 41)) == {A: ((1, 32),), B: ((17, 32),)}
    assert KNOWN.kernel_ranges(DENSE, (1, 16, 20, 36, 61, 64)) == {
        A: ((1, 20), (61, 64)),
        B: ((20, 20),),
    }
    assert KNOWN.kernel_ranges(DENSE, ()) == {}
    twice = table([(1, 4, (A, B, A))])
    assert twice.kernel_ranges(DENSE, (1, 4)) == {A: ((1, 4),), B: ((1, 4),)}
    assert twice.kernels_of(DENSE.call(1)) == (A, B, A)


def test_what_a_table_lacks() -> None:
    assert KNOWN.lacking(Demand(DENSE, range(30, 66))) == [*range(41, 60), 65]
    assert KNOWN.lacking(Demand(DENSE, (0, 1, 40, 41))) == [0, 41]
    assert KNOWN.lacking(Demand(DENSE, (1, 16, 64))) == []
    assert KNOWN.lacking(Demand(GROUPED, (128, 256))) == [128, 256]
    assert KNOWN.lacking(Demand(GROUPED, ())) == []


def test_a_table_is_its_own_source() -> None:
    def never() -> list[Demand]:
        raise AssertionError("a table knows what it knows")

    assert KNOWN.table(never) is KNOWN
    assert RULES.table(never) is RULES


def test_an_origin_in_words() -> None:
    assert ORIGIN.describe() == ("dg 1 (JIT 2), b200 (148 SMs, sm_100f), asked on a stand-in GPU")
    assert RULES.origin.describe() == (
        "sgl-deep-gemm 0.1.4.post1 (JIT 1), h200 (132 SMs, sm_90a), by our rules"
    )
    assert [source.value for source in Source] == [
        "by our rules",
        "asked on a stand-in GPU",
        "asked before, on a stand-in GPU",
    ]


# -- against one M after another ------------------------------------------------------------------

LAST = 30
choices = st.sampled_from([(), (A,), (A, B), (B, C), None])


def runs_of(each: list[tuple[Kernel, ...] | None]) -> Runs:
    """Runs of M 1 to the last; None is not known."""
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
def test_a_table_says_of_each_m_what_it_was_told(
    each: list[tuple[Kernel, ...] | None], ms: tuple[int, ...]
) -> None:
    made = table(runs_of(each))
    unknown = [m for m in ms if each[m - 1] is None]
    assert made.lacking(Demand(DENSE, ms)) == unknown
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
    assert [one[0] for one in groupby(parts, key=lambda part: part[0])] == [
        kernels for kernels, _, _ in parts
    ], "parts are as long as they can be"
    ranges = made.kernel_ranges(DENSE, ms)
    assert {
        kernel: [m for m in ms if any(a <= m <= b for a, b in pairs)]
        for kernel, pairs in ranges.items()
    } == {
        kernel: [m for m in ms if kernel in (each[m - 1] or ())]
        for kernel in dict.fromkeys(k for m in ms for k in each[m - 1] or ())
    }


@given(
    st.sampled_from([T.GEMM_NT_F8F8BF16, T.PAGED_MQA_LOGITS_METADATA, T.FP8_EINSUM_BHR_HDR_BHD]),
    st.sets(st.integers(1, 400), min_size=1, max_size=60).map(sorted).map(tuple),
)
def test_rules_recorded_are_the_rules(kind: T, ms: tuple[int, ...]) -> None:
    shape = GemmShape(kind, 1024, 4096, 4, 132)
    recorded = table([(m, m, kernels_of(shape.call(m))) for m in ms], shape)
    assert recorded.parts(shape, ms) == RULES.parts(shape, ms)
    assert recorded.kernel_ranges(shape, ms) == RULES.kernel_ranges(shape, ms)
    assert [recorded.kernels_of(shape.call(m)) for m in ms] == [
        RULES.kernels_of(shape.call(m)) for m in ms
    ]


# -- pieces ---------------------------------------------------------------------------------------


def test_runs_are_joined_where_nothing_lies_between() -> None:
    one, two, three, far = Run(1, 4, (A,)), Run(5, 8, (A,)), Run(9, 9, (B,)), Run(20, 21, (B,))
    assert join_runs([far, three, one, two], 1) == (Run(1, 8, (A,)), three, far)
    assert join_runs([one, two], 2) == (one, two)
    steps = [Run(128, 256, (A,)), Run(384, 384, (A,))]
    assert join_runs(steps, 128) == (Run(128, 384, (A,)),)
    assert join_runs([], 1) == ()


def test_cut_at() -> None:
    assert list(cut_at([1, 17, 33], (1, 16, 17, 40))) == [(0, 2), (2, 3), (3, 4)]
    assert list(cut_at([1, 17, 33], (20, 21))) == [(0, 2)]
    assert list(cut_at([1, 17], ())) == []
