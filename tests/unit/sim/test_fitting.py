"""Fits without a numerics library."""

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
def test_the_minimum_of_a_parabola_is_found(bottom: float, steep: float) -> None:
    found = minimum(lambda x: steep * (x - bottom) ** 2, 0.0, 5.0)
    assert found == pytest.approx(min(max(bottom, 0.0), 5.0), abs=1e-6)


def test_the_minimum_of_an_uneven_valley_is_found() -> None:
    assert minimum(lambda x: abs(x - 1.25) + 3 * max(x - 1.25, 0), 0.0, 4.0) == pytest.approx(1.25)
    assert minimum(lambda x: -cos(x - 2), 0.0, 4.0) == pytest.approx(2.0, abs=1e-6)


def test_exact_coefficients_come_back() -> None:
    rows = [(1.0, 2.0, 0.0), (1.0, 0.0, 5.0), (1.0, 1.0, 1.0), (1.0, 7.0, 2.0)]
    expected = [0.5, 2.0, 0.25]
    targets = [sum(a * x for a, x in zip(row, expected, strict=True)) for row in rows]
    assert non_negative(rows, targets) == pytest.approx(expected)
    # Columns may be of very different size.
    rows_2 = [(1.0, 1e9), (1.0, 5e9), (1.0, 2e9)]
    targets = [3.0 + row[1] * 2e-9 for row in rows_2]
    assert non_negative(rows_2, targets) == pytest.approx([3.0, 2e-9])


def test_a_coefficient_is_never_below_zero() -> None:
    # The line through these falls, so the best that does not fall is level.
    assert non_negative([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)], [3.0, 2.0, 1.0]) == [2.0, 0.0]
    assert non_negative([(1.0,), (2.0,)], [-1.0, -2.0]) == [0.0]


def test_dependent_columns_are_not_both_used() -> None:
    found = non_negative([(1.0, 2.0), (2.0, 4.0)], [4.0, 8.0])
    assert found in ([4.0, 0.0], [0.0, 2.0])
    assert non_negative([(0.0, 2.0), (0.0, 4.0)], [4.0, 8.0]) == [0.0, 2.0]


SMALL = st.integers(-4, 6).map(float)


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 5))
def test_no_point_of_a_grid_is_better(data: st.DataObject, width: int, many: int) -> None:
    """Against brute force: every combination of 0, 0.25, ... 3, and finer around the answer."""
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


def test_known_coefficients_stay_where_no_sample_depends_on_them() -> None:
    assert near_known([(0.0, 0.0)], [0.0], (2.0, 0.5)) == pytest.approx([2.0, 0.5])
    rows = [(100.0, 0.0)] * 50
    assert near_known(rows, [300.0] * 50, (2.0, 0.5)) == pytest.approx([3.0, 0.5], rel=1e-4)
    # What was known as 0 has no weight.
    assert near_known([(1.0, 1.0), (1.0, 2.0)], [3.0, 4.0], (0.0, 0.0)) == pytest.approx([2.0, 1.0])


def test_a_known_coefficient_weighs_as_a_sample_of_0_3_seconds() -> None:
    # One sample of 0.3 s at 4, and 0.3 s at the known 2: squares meet in the middle of
    # (x * 0.3 / 2 - 0.3)^2 + (x * 0.3 / 4 - 0.3)^2.
    (found,) = near_known([(0.3 / 4,)], [0.3], (2.0,))
    a, b = 0.3 / 2, 0.3 / 4
    assert found == pytest.approx(0.3 * (a + b) / (a * a + b * b))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.5, 9), st.floats(0.5, 9)), min_size=4, max_size=9),
    st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)),
)
def test_samples_that_agree_with_what_is_known_change_nothing(
    rows: list[tuple[float, float]], known: tuple[float, float]
) -> None:
    assume(len(set(rows)) > 2)
    targets = [row[0] * known[0] + row[1] * known[1] for row in rows]
    assert near_known(rows, targets, known) == pytest.approx(known, rel=1e-6)
