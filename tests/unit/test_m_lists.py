"""Lists of M: the numbers that SGLang and vLLM state, and what lies between."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.backend.m_lists import (
    expand,
    fast_m_list,
    full_m_list,
    full_m_max,
    multiples_of,
    relax_m_list,
    steps_of,
)


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
def test_full(chunked: int, last: int) -> None:
    assert full_m_max(chunked) == last
    assert full_m_list(chunked) == range(1, last + 1)


@pytest.mark.parametrize(
    ("chunked", "count", "last"),
    # 1..1024, then 512 - 1 or 512 more an octave, and the largest.
    [
        (8192, 1024 + 511 + 512 + 512 + 1, 8192),
        (16384, 3072, 16384),
        (0, 3072, 16384),
        (512, 1024, 1024),
        (1024, 1024, 1024),
        (1025, 1024 + 511 + 1, 2046),
        (6000, 1024 + 511 + 512 + 512, 8184),
        (6001, 1024 + 511 + 512 + 512 + 1, 8184),
        (100000, 3584, 32768),
    ],
)
def test_fast_counts(chunked: int, count: int, last: int) -> None:
    listed = fast_m_list(chunked)
    assert (len(listed), listed[-1]) == (count, last)


def test_fast_steps_double() -> None:
    listed = fast_m_list(8192)
    assert listed[:1024] == tuple(range(1, 1025))
    assert listed[1024:1027] == (1026, 1028, 1030)
    assert [b - a for a, b in zip(listed[-3:], listed[-2:], strict=False)] == [8, 8]


def upstreams_fast_list(chunked: int) -> list[int]:
    """SGLang 0.5.23's algorithm, word for word in what it does: lists that are joined and sorted.

    An octave is sampled to its end even where the largest prefill lies within it.
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
def test_fast_is_upstreams(chunked: int) -> None:
    assert list(fast_m_list(chunked)) == upstreams_fast_list(chunked)


def test_relax() -> None:
    listed = relax_m_list(300, 32, 132)
    assert listed[:11] == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert set(range(64, 301, 64)) <= set(listed)
    assert listed[-1] <= 300
    # One wave of 64-row blocks over 256 columns of 16: 132 * 64 // 16 = 528 rows.
    assert 528 in relax_m_list(16384, 256, 132)


def test_multiples() -> None:
    assert multiples_of((1, 128, 129, 256), 128) == (128, 256)


def test_steps() -> None:
    assert steps_of(()) == steps_of(range(0)) == ()
    assert steps_of([7]) == ((7, 7, 1),)
    assert steps_of(range(128, 1000, 128)) == ((128, 896, 128),)
    assert steps_of([1, 2, 3, 5, 7, 100]) == ((1, 3, 1), (5, 7, 2), (100, 100, 1))
    # 1..1024, three octaves, and the largest: what a Schedule holds of 2560 values.
    assert steps_of(fast_m_list(8192)) == (
        (1, 1024, 1),
        (1026, 2048, 2),
        (2052, 4096, 4),
        (4104, 8192, 8),
    )


ascending = st.sets(st.integers(1, 10**6), max_size=60).map(sorted)
runs = st.lists(st.tuples(st.integers(1, 500), st.integers(1, 20), st.integers(1, 9)), max_size=5)


@given(ascending)
def test_steps_hold_exactly_the_values(values: list[int]) -> None:
    assert expand(steps_of(values)) == values


@given(runs)
def test_steps_of_regular_values_are_few(pieces: list[tuple[int, int, int]]) -> None:
    values: list[int] = []
    for gap, count, step in pieces:
        start = (values[-1] if values else 0) + gap
        values += range(start, start + count * step, step)
    steps = steps_of(values)
    assert expand(steps) == values
    # A gap can at worst cut the piece behind it in two.
    assert len(steps) <= 2 * len(pieces)
    assert all(first <= last and (last - first) % step == 0 for first, last, step in steps)


@given(st.integers(1, 500), st.integers(0, 5000), st.integers(1, 300))
def test_steps_of_a_range_are_one_run(start: int, length: int, step: int) -> None:
    values = range(start, start + length, step)
    assert len(steps_of(values)) == bool(length)
    assert expand(steps_of(values)) == list(values)
