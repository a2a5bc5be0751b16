"""Lists of M: the numbers that SGLang and vLLM state, and what lies between."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.m_lists import fast_m_list, full_m_list, full_m_max, multiples_of, relax_m_list


@pytest.mark.parametrize(
    ("chunked", "last"),
    [(-1, 65536), (0, 65536), (1, 16384), (8192, 16384), (8193, 16386), (16384, 32768),
     (65536, 131072), (100000, 131072)],
)  # fmt: skip
def test_full(chunked: int, last: int) -> None:
    assert full_m_max(chunked) == last
    assert full_m_list(chunked) == range(1, last + 1)


@pytest.mark.parametrize(
    ("chunked", "count", "last"),
    # 1..1024, then 512 - 1 or 512 more an octave, and the largest.
    [(8192, 1024 + 511 + 512 + 512 + 1, 8192), (16384, 3072, 16384), (0, 3072, 16384),
     (512, 512, 512), (100000, 3584, 32768)],
)  # fmt: skip
def test_fast_counts(chunked: int, count: int, last: int) -> None:
    listed = fast_m_list(chunked)
    assert (len(listed), listed[-1]) == (count, last)


def test_fast_steps_double() -> None:
    listed = fast_m_list(8192)
    assert listed[:1024] == tuple(range(1, 1025))
    assert listed[1024:1027] == (1026, 1028, 1030)
    assert [b - a for a, b in zip(listed[-3:], listed[-2:], strict=False)] == [8, 8]


@given(st.integers(-1, 200000))
def test_fast_is_ascending_and_within_full(chunked: int) -> None:
    listed = fast_m_list(chunked)
    assert list(listed) == sorted(set(listed))
    assert listed[0] == 1


def test_relax() -> None:
    listed = relax_m_list(300, 32, 132)
    assert listed[:11] == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert set(range(64, 301, 64)) <= set(listed)
    assert listed[-1] <= 300
    # One wave of 64-row blocks over 256 columns of 16: 132 * 64 // 16 = 528 rows.
    assert 528 in relax_m_list(16384, 256, 132)


def test_multiples() -> None:
    assert multiples_of((1, 128, 129, 256), 128) == (128, 256)
