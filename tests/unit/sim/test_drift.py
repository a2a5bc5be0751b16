"""Machines that are faster or slower at first than they are on average."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import exp, log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.timeline import Span, Timeline
from sim.calibration.drift import Drift, drifted, undrifted
from sim.costs.start_up import PHASES, StartPhases, start_phases
from sim.simulate import simulate
from tests.unit.tiny_runs import h200, machine, scenario

HALVED = 10 * log(2)
"""Seconds in which half of a difference that settles in 10 s is gone."""

SLOW, FAST = Drift(2.0, 10.0), Drift(0.5, 10.0)
FACTORS = st.floats(0.2, 5)
SETTLINGS = st.floats(0.5, 500)
TIMES = st.floats(0, 2000)
DRIFTS = st.builds(
    lambda factor, settling, start, length: Drift(factor, settling, (start, start + length)),
    FACTORS,
    SETTLINGS,
    st.floats(0, 200),
    st.floats(0, 200),
)


# -- clocks ---------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(DRIFTS, TIMES)
def test_the_two_clocks_are_each_others_inverse(drift: Drift, time: float) -> None:
    assert drift.nominal(drift.real(time)) == pytest.approx(time, rel=1e-9, abs=1e-9)
    assert drift.real(drift.nominal(time)) == pytest.approx(time, rel=1e-9, abs=1e-9)


@given(DRIFTS)
def test_both_clocks_begin_at_zero(drift: Drift) -> None:
    assert drift.nominal(0.0) == drift.real(0.0) == 0.0


@given(SETTLINGS, TIMES)
def test_a_machine_of_the_profiles_speed_changes_nothing(settling: float, time: float) -> None:
    drift = Drift(1.0, settling)
    assert drift.nominal(time) == drift.real(time) == time


def test_a_slow_machine_has_done_less() -> None:
    # A speed of 1 - exp(-t / 10) / 2: of t seconds 5 (1 - exp(-t / 10)) are lost.
    assert SLOW.nominal(HALVED) == pytest.approx(HALVED - 2.5)
    assert SLOW.nominal(2 * HALVED) == pytest.approx(2 * HALVED - 3.75)
    assert SLOW.nominal(10) == pytest.approx(5 + 5 / exp(1))
    assert SLOW.nominal(1e4) == pytest.approx(1e4 - 5)
    assert SLOW.real(HALVED - 2.5) == pytest.approx(HALVED)


def test_a_fast_machine_has_done_more() -> None:
    # A speed of 1 + exp(-t / 10): 10 (1 - exp(-t / 10)) seconds are won.
    assert FAST.nominal(HALVED) == pytest.approx(HALVED + 5)
    assert FAST.nominal(1e4) == pytest.approx(1e4 + 10)
    assert FAST.real(HALVED + 5) == pytest.approx(HALVED)


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_the_factor_is_the_starts(factor: float) -> None:
    assert Drift(factor, 100.0).nominal(1e-3) == pytest.approx(1e-3 / factor, rel=1e-4)


def test_in_a_pause_both_clocks_go_alike_while_the_machine_settles() -> None:
    drift = replace(SLOW, pause=(HALVED, 2 * HALVED))
    assert drift.nominal(HALVED) == SLOW.nominal(HALVED)
    assert drift.nominal(1.5 * HALVED) == pytest.approx(1.5 * HALVED - 2.5)
    assert drift.nominal(2 * HALVED) == pytest.approx(2 * HALVED - 2.5)
    # Of the third stretch only an eighth of the difference is lost, as it would be without one.
    assert drift.nominal(3 * HALVED) == pytest.approx(3 * HALVED - 2.5 - 0.625)
    assert drift.real(3 * HALVED - 3.125) == pytest.approx(3 * HALVED)


@settings(max_examples=200, deadline=None)
@given(DRIFTS, st.lists(st.integers(0, 10**9), min_size=2, max_size=12, unique=True))
def test_what_comes_first_stays_first(drift: Drift, microseconds: list[int]) -> None:
    times = [1e-6 * at for at in sorted(microseconds)]
    for clock in (drift.nominal, drift.real):
        assert all(early < late for early, late in pairwise(map(clock, times)))


# -- runs -----------------------------------------------------------------------------------------


BEFORE = [("imports", 1.0), ("process group", HALVED - 3.5), ("weights", HALVED)]
STARTED, LOADED = HALVED - 2.5, 2 * HALVED - 2.5


def run(*times: tuple[float, float]) -> Timeline:
    """Two ranks that begin with ``BEFORE`` and then do things at these times."""
    spans = []
    for rank in (0, 1):
        for kind in ("phase", "setup"):
            at = 0.0
            for name, seconds in BEFORE:
                spans.append(Span(rank, at, at + seconds, kind, name))
                at += seconds
        spans += [Span(rank, start, end, "compute", "x") for start, end in times]
    return Timeline("none", "predicted", 2, tuple(spans), {"pp": 1})


def test_weights_take_what_they_take_and_all_else_longer() -> None:
    # The second stretch is in the third halving: 0.625 s of it are lost.
    made = drifted(run((LOADED, 3 * HALVED - 3.125)), SLOW, BEFORE)
    for rank in (0, 1):
        spans = {(s.kind, s.name): (s.start, s.end) for s in made.of_rank(rank)}
        assert spans["phase", "process group"][1] == pytest.approx(HALVED)
        assert spans["phase", "weights"] == pytest.approx((HALVED, 2 * HALVED))
        assert spans["setup", "weights"] == spans["phase", "weights"]
        assert spans["compute", "x"] == pytest.approx((2 * HALVED, 3 * HALVED))
    assert (made.meta, made.policy, made.world_size) == ({"pp": 1}, "none", 2)


def test_without_weights_nothing_pauses() -> None:
    plain = Timeline("none", "predicted", 1, (Span(0, 0.0, 3 * HALVED - 4.375, "compute", "x"),))
    (span,) = drifted(plain, SLOW, []).spans
    assert (span.start, span.end) == pytest.approx((0.0, 3 * HALVED))
    (span,) = undrifted(replace(plain, spans=(replace(span, end=3 * HALVED),)), SLOW).spans
    assert span.end == pytest.approx(3 * HALVED - 4.375)


@settings(max_examples=60, deadline=None)
@given(
    FACTORS,
    SETTLINGS,
    st.lists(st.tuples(TIMES, TIMES).map(lambda pair: (min(pair), max(pair))), max_size=5),
)
def test_a_drifted_run_undrifted_is_the_run(
    factor: float, settling: float, times: list[tuple[float, float]]
) -> None:
    drift = Drift(factor, settling)
    made = run(*((LOADED + start, LOADED + end) for start, end in times))
    back = undrifted(drifted(made, drift, BEFORE), drift)
    assert replace(back, spans=made.spans) == made
    for span, expected in zip(back.spans, made.spans, strict=True):
        assert replace(span, start=expected.start, end=expected.end) == expected
        assert (span.start, span.end) == pytest.approx((expected.start, expected.end), abs=1e-8)


def test_the_pause_is_from_the_first_ranks_weights_to_the_lasts() -> None:
    weights = [Span(0, 0.0, 3.0, "phase", "weights"), Span(1, 1.0, 2 * HALVED, "phase", "weights")]
    made = Timeline("none", "measured", 2, (*weights, Span(0, 3.0, 3 * HALVED, "compute", "x")))
    *same, work = undrifted(made, SLOW).spans
    assert [(s.start, s.end) for s in same] == [(s.start, s.end) for s in weights]
    assert (work.start, work.end) == pytest.approx((3.0, 3 * HALVED - 0.625))


def test_a_run_on_a_machine_of_the_profiles_speed_stays_as_it_is() -> None:
    one, level = run((LOADED, LOADED + 1.0)), Drift(1.0, 10.0)
    assert drifted(one, level, BEFORE) == one
    assert undrifted(one, level) == one


def test_a_prediction_of_a_machine_that_drifts_is_the_run_drifted() -> None:
    one, start = scenario(tp=2), StartPhases()
    plain = simulate(one, machine(start=start)).timeline
    made = simulate(one, machine(start=start, drift=SLOW)).timeline
    before = start_phases(start, h200().start_up, one.model, one.parallel, 1)
    assert [name for name, _ in before] == list(PHASES)
    assert made == drifted(plain, SLOW, before) != plain
    assert plain.wall + 4 < made.wall < plain.wall + 5
