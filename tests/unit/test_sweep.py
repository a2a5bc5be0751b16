"""A sweep's points and its Pareto frontier of start-up time and coverage."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.cli.sweep import AxisOptions
from runner.config.warmup import WarmupPolicy
from sim.costs.profile import load_profile
from sim.sweep.points import Skipped, Sweep, by_start_up, count_reasons
from tests.unit.sweeps import SETTINGS, point, result

Pair = tuple[float, Fraction]


def frontier(pairs: list[Pair], *lost: int) -> list[bool]:
    """Whether each result is on the frontier; those in ``lost`` are ended by the watchdog."""
    results = [
        result(
            seconds,
            covered.numerator,
            point(cores=1 + index),
            planned=covered.denominator,
            timeout_seconds=600.0 if index in lost else None,
        )
        for index, (seconds, covered) in enumerate(pairs)
    ]
    sweep = Sweep(settings=SETTINGS, results=tuple(by_start_up(results)), skipped=())
    return [item.point in sweep.frontier for item in results]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], []),
        ([(3, 0)], [True]),
        ([(2, 1), (1, 0.5)], [True, True]),
        ([(1, 1), (2, 0.5)], [True, False]),
        ([(1, 0.5), (2, 0.5)], [True, False]),
        ([(1, 0.5), (1, 1)], [False, True]),
        ([(1, 0.5), (1, 0.5), (2, 0.5)], [True, True, False]),
        ([(2, 1), (1, 0.5), (2, 1), (1, 0.25), (3, 1)], [True, True, True, False, False]),
    ],
    ids=str,
)
def test_frontier_of_known_points(points: list[tuple[float, float]], expected: list[bool]) -> None:
    assert frontier([(seconds, Fraction(covered)) for seconds, covered in points]) == expected


def test_frontier_compares_coverage_exactly() -> None:
    least = Fraction(10**20 - 1, 10**20)
    assert float(least) == 1.0
    assert frontier([(1.0, least), (2.0, Fraction(1)), (2.0, least)]) == [True, True, False]


few = st.tuples(st.integers(0, 4).map(float), st.fractions(0, 1, max_denominator=4))
many = st.tuples(st.floats(0, 1e6), st.fractions(0, 1))


def beats(one: Pair, other: Pair) -> bool:
    """The definition of the frontier, for one pair."""
    return one[0] <= other[0] and one[1] >= other[1] and one != other


@given(st.lists(few, max_size=12) | st.lists(many, max_size=12))
def test_frontier_holds_points_that_no_other_beats(found: list[Pair]) -> None:
    assert frontier(found) == [not any(beats(one, other) for one in found) for other in found]


def test_run_ended_by_the_watchdog_is_not_on_the_frontier() -> None:
    pairs = [(1.0, Fraction(1)), (2.0, Fraction(1, 2))]
    assert frontier(pairs, 0) == [False, True]
    assert frontier(pairs[:1], 0) == [False]


def test_coverage_is_a_fraction_and_1_for_an_empty_plan() -> None:
    assert result(1.0, 46, planned=644).coverage == Fraction(1, 14)
    assert result(1.0, 0, planned=0).coverage == 1


def test_results_are_sorted_by_start_up_then_coverage_then_input_order() -> None:
    given = [result(2.0, 9, point(cores=cores)) for cores in (4, 2)]
    given += [result(1.0, 1, point(cores=8)), result(2.0, 10, point(cores=1))]
    assert [item.point.cores for item in by_start_up(given)] == [8, 1, 4, 2]


def test_points_are_all_distinct_combinations_grouped_by_layout() -> None:
    policies = (WarmupPolicy.NONE, WarmupPolicy.PLANNED, WarmupPolicy.NONE)
    axes = AxisOptions(pp=(1, 2), tp=(4,), ep=("off", "on"), nodes=(1, 2, 1), warmup=policies)
    points = replace(axes, cores=(16,)).points(load_profile("h200"))
    assert points == [
        point(policy, pp=pp, tp=4, ep=ep, nodes=nodes)
        for pp in (1, 2)
        for ep in (False, True)
        for nodes in (1, 2)
        for policy in ("none", "planned")
    ]


def test_default_is_one_node_per_stage() -> None:
    axes = AxisOptions(pp=(1, 2, 4), tp=(1,), warmup=(WarmupPolicy.NONE,))
    points = axes.points(load_profile("h200"))
    assert {at.cores for at in points} == {load_profile("h200").cores_per_node}
    assert [(at.pp, at.nodes) for at in points] == [(1, 1), (2, 2), (4, 4)]


def test_skip_reasons_are_sorted_by_frequency() -> None:
    skipped = [Skipped(point(tp=tp), f"tp={tp} is odd") for tp in (3, 5, 7, 5)]
    assert count_reasons(skipped) == [("tp=5 is odd", 2), ("tp=3 is odd", 1), ("tp=7 is odd", 1)]
