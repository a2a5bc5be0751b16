"""Numerical fits in pure Python."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import cos

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sim.calibration.fitting import minimum, near_known, non_negative


def error(
    rows: Sequence[Sequence[float]], targets: Sequence[float], found: Sequence[float]
) -> float:
    return sum(
        (sum(a * x for a, x in zip(row, found, strict=True)) - target) ** 2
        for row, target in zip(rows, targets, strict=True)
    )


@given(st.floats(-3, 8), st.floats(0.1, 5))
def test_minimum_of_a_parabola_within_bounds(bottom: float, steep: float) -> None:
    found = minimum(lambda x: steep * (x - bottom) ** 2, 0.0, 5.0)
    assert found == pytest.approx(min(max(bottom, 0.0), 5.0), abs=1e-6)


def test_minimum_of_asymmetric_functions() -> None:
    assert minimum(lambda x: abs(x - 1.25) + 3 * max(x - 1.25, 0), 0.0, 4.0) == pytest.approx(1.25)
    assert minimum(lambda x: -cos(x - 2), 0.0, 4.0) == pytest.approx(2.0, abs=1e-6)


def test_non_negative_recovers_exact_coefficients() -> None:
    rows = [(1.0, 2.0, 0.0), (1.0, 0.0, 5.0), (1.0, 1.0, 1.0), (1.0, 7.0, 2.0)]
    expected = [0.5, 2.0, 0.25]
    targets = [sum(a * x for a, x in zip(row, expected, strict=True)) for row in rows]
    assert non_negative(rows, targets) == pytest.approx(expected)
    # Columns may differ widely in magnitude.
    rows_2 = [(1.0, 1e9), (1.0, 5e9), (1.0, 2e9)]
    targets = [3.0 + row[1] * 2e-9 for row in rows_2]
    assert non_negative(rows_2, targets) == pytest.approx([3.0, 2e-9])


def test_non_negative_clips_negative_coefficients_to_zero() -> None:
    # The best line through these points falls, so the best non-falling one is level.
    assert non_negative([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)], [3.0, 2.0, 1.0]) == [2.0, 0.0]
    assert non_negative([(1.0,), (2.0,)], [-1.0, -2.0]) == [0.0]


def test_non_negative_uses_only_one_of_two_dependent_columns() -> None:
    found = non_negative([(1.0, 2.0), (2.0, 4.0)], [4.0, 8.0])
    assert found in ([4.0, 0.0], [0.0, 2.0])
    assert non_negative([(0.0, 2.0), (0.0, 4.0)], [4.0, 8.0]) == [0.0, 2.0]


SMALL = st.integers(-4, 6).map(float)


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 5))
def test_non_negative_is_at_least_as_good_as_a_grid_search(
    data: st.DataObject, width: int, many: int
) -> None:
    """The grid is 0, 0.25, ..., 3 in each dimension, and 0.01 around the answer."""
    row = st.lists(SMALL, min_size=width, max_size=width)
    rows = data.draw(st.lists(row, min_size=many, max_size=many))
    targets = data.draw(st.lists(SMALL, min_size=many, max_size=many))
    found = non_negative(rows, targets)
    assert min(found) >= 0
    least = error(rows, targets, found)
    for point in product([0.25 * step for step in range(13)], repeat=width):
        assert least <= error(rows, targets, point) + 1e-6
    for step in product((-0.01, 0.0, 0.01), repeat=width):
        near = [max(0.0, x + by) for x, by in zip(found, step, strict=True)]
        assert least <= error(rows, targets, near) + 1e-6


def test_near_known_keeps_coefficients_that_no_sample_depends_on() -> None:
    assert near_known([(0.0, 0.0)], [0.0], (2.0, 0.5)) == pytest.approx([2.0, 0.5])
    rows = [(100.0, 0.0)] * 50
    assert near_known(rows, [300.0] * 50, (2.0, 0.5)) == pytest.approx([3.0, 0.5], rel=1e-4)
    # Known values of 0 have no weight.
    assert near_known([(1.0, 1.0), (1.0, 2.0)], [3.0, 4.0], (0.0, 0.0)) == pytest.approx([2.0, 1.0])


def test_known_coefficient_weighs_as_much_as_a_sample_of_0_3_seconds() -> None:
    # One sample of 0.3 s implies 4, the known value is 2; the result minimises
    # (x * 0.3 / 2 - 0.3)^2 + (x * 0.3 / 4 - 0.3)^2.
    (found,) = near_known([(0.3 / 4,)], [0.3], (2.0,))
    a, b = 0.3 / 2, 0.3 / 4
    assert found == pytest.approx(0.3 * (a + b) / (a * a + b * b))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.5, 9), st.floats(0.5, 9)), min_size=4, max_size=9),
    st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)),
)
def test_near_known_is_unchanged_by_samples_that_agree_with_it(
    rows: list[tuple[float, float]], known: tuple[float, float]
) -> None:
    assume(len(set(rows)) > 2)
    targets = [row[0] * known[0] + row[1] * known[1] for row in rows]
    assert near_known(rows, targets, known) == pytest.approx(known, rel=1e-6)
