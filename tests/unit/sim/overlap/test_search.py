"""The search for the best placement, against the exposed wait of every placement."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from io import StringIO
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.config.hf import load_model, with_layers
from runner.config.parallel import ParallelConfig
from runner.config.warmup import WarmupPolicy
from runner.model.strategy import NEEDS, STRATEGIES, OverlapStrategy
from runner.report.overlap_table import print_comparison
from runner.scenario import Scenario
from runner.schedule import Begin, Collective
from sim.costs.profile import load_profile
from sim.costs.profile_costs import ProfileCosts
from sim.overlap import search as searching
from sim.overlap.compare import Comparison, Run, compare
from sim.overlap.forward import Forward, LayerSteps, Step, StepKind, Steps, Work, to_steps
from sim.overlap.placements import (
    OPERATIONS,
    Choices,
    Placements,
    all_choices,
    legal_orders,
    line_up,
    to_strategy,
)
from sim.overlap.search import find_window, search
from sim.overlap.turns import Piece, Turns, explain_waits, run

ORDERS = list(legal_orders())
LIKE = STRATEGIES["deepseek-decode"]
ROUNDING = 1e-9

# -- random work ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Which optional collectives each layer has; the same for all layers."""

    gathers: bool
    scatters: bool
    routes: bool
    shared: bool
    sums: bool


TRAFFIC = st.builds(Traffic, *[st.booleans()] * 5)
TIME = st.integers(0, 5) | st.integers(0, 997)
ON_LINK = 7
"""The most collectives that a layer can have."""


def layer(
    half: int, traffic: Traffic, compute: list[int], link: list[int], unit: float
) -> LayerSteps:
    """Compute before and after each operation's communication; times are in units of ``unit`` s."""
    seconds = iter(unit * number for number in link)

    def both(kind: StepKind, name: str, *, there: bool = True) -> Steps:
        its = next(seconds)
        return (Step(kind, name, its),) if there else ()

    tokens, routing, results = (f"{name} of {half}" for name in ("tokens", "routing", "results"))
    inside: dict[str, Steps] = {
        "comm_prepare_attn": both(StepKind.BLOCK, "gather", there=traffic.gathers),
        "attn_core": both(StepKind.BLOCK, "scatter", there=traffic.scatters),
        "dispatch_a": (
            *both(StepKind.BEGIN, tokens),
            *both(StepKind.BEGIN, routing, there=traffic.routes),
        ),
        "shared_experts": both(StepKind.BLOCK, "shared", there=traffic.shared),
        "dispatch_b": (
            Step(StepKind.AWAIT, tokens, 0.0),
            *((Step(StepKind.AWAIT, routing, 0.0),) if traffic.routes else ()),
        ),
        "combine_a": both(StepKind.BEGIN, results),
        "combine_b": (Step(StepKind.AWAIT, results, 0.0),),
        "output": both(StepKind.BLOCK, "sum", there=traffic.sums),
    }
    return {
        name: (
            Step(StepKind.COMPUTE, "", unit * compute[2 * index]),
            *inside.get(name, ()),
            Step(StepKind.COMPUTE, "", unit * compute[2 * index + 1]),
        )
        for index, name in enumerate(NEEDS)
    }


@st.composite
def works(draw: st.DrawFn, layers: st.SearchStrategy[int]) -> Work:
    """Layers of one kind or of two alternating, perhaps with one odd layer; the halves differ."""
    traffic, unit = draw(TRAFFIC), draw(st.sampled_from([1.0, 1.3e-5]))
    numbers = st.lists(TIME, min_size=2 * OPERATIONS, max_size=2 * OPERATIONS)
    links = st.lists(TIME, min_size=ON_LINK, max_size=ON_LINK)
    kinds = [
        [layer(half, traffic, draw(numbers), draw(links), unit) for half in (0, 1)]
        for _ in range(draw(st.integers(1, 3)))
    ]
    count = draw(layers)
    which = [index % min(2, len(kinds)) for index in range(count)]
    if len(kinds) > 2:
        which[draw(st.integers(0, count - 1))] = 2
    first, second = (tuple(kinds[kind][half] for kind in which) for half in (0, 1))
    return Work((), (first, second), (), range(count))


def waits_of(work: Work, strategy: OverlapStrategy) -> float:
    return run(replace(work, before=(), after=()).in_turns(strategy)).exposed


SETS = st.integers(1, 2**OPERATIONS - 1)
"""Sets of marks, one bit per operation."""

ANY = st.sets(st.tuples(SETS, st.integers(0, 3)), min_size=20, max_size=40)
"""Arbitrary (set of marks, lead) pairs."""


def within(marks: set[int]) -> set[tuple[int, int]]:
    """Every subset of ``marks`` with every lead: many placements that differ little."""
    every = [
        sum(mark << place for mark, place in zip(bits, marks, strict=True))
        for bits in product((0, 1), repeat=len(marks))
    ]
    return {(mask, lead) for mask in every if mask for lead in range(mask.bit_count() + 1)}


ALIKE = st.sets(st.integers(0, OPERATIONS - 1), min_size=4, max_size=4).map(within)
SAMPLES = (ALIKE | ANY).map(lambda pairs: some(sorted({row_of(*pair) for pair in pairs})))
"""A sample of all choices, in their original order."""


@cache
def every() -> Choices:
    return all_choices()


@cache
def _rows() -> dict[tuple[int, int], int]:
    choices = every()
    masks = (np.where(choices.marks > 0, 1 << choices.marks, 0).sum(axis=1) >> 1).tolist()
    return {pair: row for row, pair in enumerate(zip(masks, choices.leads.tolist(), strict=True))}


def row_of(mask: int, lead: int) -> int:
    """Row of a set of marks and a lead; a lead above the number of marks is reduced to it."""
    return _rows()[mask, min(lead, mask.bit_count())]


def some(rows: list[int]) -> Choices:
    choices = every()
    return Choices(choices.marks[rows], choices.sizes[rows], choices.leads[rows])


def limit_search_to(choices: Choices, orders: list[tuple[str, ...]]) -> pytest.MonkeyPatch:
    """Limit the search to these placements until the patch is undone."""
    patch = pytest.MonkeyPatch()
    patch.setattr(searching, "all_choices", lambda: choices)
    patch.setattr(searching, "legal_orders", lambda: iter(orders))
    return patch


# -- the best of all ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(
    works(st.sampled_from([3, 4, 5, 8, 9, 12])),
    SAMPLES,
    st.lists(st.sampled_from(ORDERS), min_size=2, max_size=5, unique=True),
    st.sampled_from(ORDERS),
)
def test_search_finds_the_smallest_wait_and_prefers_fewer_marks_then_smaller_lead(
    work: Work, choices: Choices, orders: list[tuple[str, ...]], own: tuple[str, ...]
) -> None:
    like = OverlapStrategy("like", ForwardMode.DECODE, own, 0, 7)
    patch = limit_search_to(choices, orders)
    try:
        found = search(work, like)
    finally:
        patch.undo()
    waits = {
        (size, lead, order != own, orders.index(order), at): waits_of(
            work, to_strategy(like, order, choices, at)
        )
        for order in orders
        for at, (size, lead) in enumerate(
            zip(choices.sizes.tolist(), choices.leads.tolist(), strict=True)
        )
    }
    least = min(waits.values())
    size, lead, *order, _ = min(key for key, its in waits.items() if its <= least + ROUNDING)
    best = found.best
    assert found.placements == len(waits)
    assert waits_of(work, best) == pytest.approx(least, abs=ROUNDING)
    assert (best.steps.count("|"), best.delta_stages) == (size, lead)
    assert [best.operations != own, orders.index(best.operations)] == order
    assert (best.name, best.mode, best.comm_sms) == ("best of all", ForwardMode.DECODE, 7)


# -- bounds ---------------------------------------------------------------------------------------


def check_waits(work: Work, choices: Choices, order: tuple[str, ...]) -> list[tuple[float, float]]:
    """Lower bound and exact wait of each distinct placement, both checked."""
    window, times = find_window(work)
    assert times
    placements = Placements.of(work, order, choices)
    found = [
        *zip((times * placements.waits(window)).tolist(), placements.waits().tolist(), strict=True)
    ]
    for at, (bound, waits) in zip(placements.which.tolist(), found, strict=True):
        alone = waits_of(work, to_strategy(LIKE, order, choices, at))
        assert 0 <= bound <= waits + ROUNDING and waits == pytest.approx(alone, abs=ROUNDING)
    return found


@settings(deadline=None, max_examples=20)
@given(works(st.integers(7, 16)), SAMPLES, st.sampled_from(ORDERS))
def test_window_gives_a_lower_bound_of_the_wait(
    work: Work, choices: Choices, order: tuple[str, ...]
) -> None:
    assert len(check_waits(work, choices, order)) <= len(choices.sizes)


def test_window_is_four_repeating_layers_and_how_often_they_repeat() -> None:
    one, other = (layer(0, Traffic(*[False] * 5), [time] * 28, [1] * 7, 1.0) for time in (1, 2))

    def window(kinds: list[LayerSteps]) -> tuple[range, int]:
        return find_window(Work((), (tuple(kinds), tuple(kinds)), (), range(len(kinds))))

    none = (range(0), 0)
    assert [window([one] * count) for count in (0, 6)] == [none, none]
    times = {7: 1, 10: 1, 11: 2, 15: 3}
    assert {count: window([one] * count) for count in times} == {
        count: (range(4), its) for count, its in times.items()
    }
    assert window([one, other] * 8) == (range(4), 3)
    # Layers that differ are left out, and so are the layers just before them.
    assert window([other, *[one] * 15]) == (range(1, 5), 3)
    assert window([*[one] * 9, other, *[one] * 12]) == (range(10, 14), 2)


# -- recorded forwards ----------------------------------------------------------------------------

BATCHES = {
    ForwardMode.DECODE: ForwardBatch.decode((1025,) * 512),
    ForwardMode.EXTEND: ForwardBatch.extend((1024,) * 4),
}
NAMED = {
    mode: [strategy for strategy in STRATEGIES.values() if strategy.mode is mode]
    for mode in ForwardMode
}


def forward(name: str, layers: int, hardware: str) -> tuple[Scenario, ProfileCosts]:
    profile = load_profile(hardware)
    scenario = Scenario(
        model=with_layers(load_model(name), layers),
        parallel=ParallelConfig(pp=1, tp=8 if name == "dsv4" else 2, ep=True, moe_a2a=True),
        policy=WarmupPolicy.NONE,
        num_sms=profile.num_sms,
    )
    return scenario, ProfileCosts(profile, profile.links["nvlink"], profile.cores_per_node)


def of_all(
    mode: ForwardMode,
    scenario: Scenario,
    costs: ProfileCosts,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    return compare(Forward(scenario, 0, BATCHES[mode]), costs, NAMED[mode], progress)


@pytest.mark.parametrize("mode", ForwardMode)
@pytest.mark.parametrize("hardware", ["h200", "h100", "h20", "b200"])
def test_no_named_strategy_beats_the_search(hardware: str, mode: ForwardMode) -> None:
    comparison = of_all(mode, *forward("dsv4", 6, hardware))
    whole, *named, best = comparison.runs
    assert whole.strategy is None and [run.strategy for run in named] == NAMED[mode]
    assert comparison.found is not None and best.strategy == comparison.found.best
    for one in named:
        assert best.turns.seconds <= one.turns.seconds + ROUNDING
    its = comparison.reference
    assert its.turns.seconds == min(run.turns.seconds for run in named)
    # The gain is shorter waiting: compute time is the same, because the SM count is.
    assert its.strategy is not None and best.strategy is not None
    assert best.strategy.comm_sms == its.strategy.comm_sms
    assert best.turns.compute == pytest.approx(its.turns.compute, rel=1e-9)
    reasons = explain_waits(its.turns, best.turns)
    for at, turns in enumerate((its.turns, best.turns)):
        waited = sum(waits.waited[at] for waits in reasons)
        assert waited == pytest.approx(sum(layer.exposed for layer in turns.by_layer()), rel=1e-9)


@pytest.mark.parametrize("mode", ForwardMode)
def test_lower_bound_of_a_recorded_forward_is_above_40_percent(mode: ForwardMode) -> None:
    """With twenty layers, most of the wait lies in the window."""
    scenario, costs = forward("dsv4", 20, "h200")
    work = Forward(scenario, 0, BATCHES[mode]).in_halves(0, lambda ops: to_steps(ops, costs))
    assert find_window(work) == (range(2, 6), 3)
    pairs = check_waits(work, some(list(range(0, len(every().sizes), 1801))), ORDERS[0])
    bounds, waits = np.array(pairs).T
    assert (bounds > 0.4 * waits).all()


class Free(ProfileCosts):
    """Costs with communication that takes no time."""

    def collective_seconds(self, op: Collective | Begin) -> float:
        return 0.0


def text_of(comparison: Comparison) -> str:
    stream = StringIO()
    print_comparison(comparison, "title", Console(width=200, file=stream), per_layer=False)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ForwardMode)
def test_output_says_so_if_no_placement_waits_less(mode: ForwardMode) -> None:
    scenario, costs = forward("dsv4-tiny", 4, "h200")
    free = Free(costs.profile, costs.link, costs.cores)
    patch = limit_search_to(some(list(range(0, len(every().sizes), 997))), ORDERS)
    try:
        comparison = of_all(mode, scenario, free)
    finally:
        patch.undo()
    assert comparison.found is not None
    assert comparison.best.turns.seconds == pytest.approx(comparison.reference.turns.seconds)
    count, name = f"{comparison.found.placements:,}", comparison.reference.name
    text = text_of(comparison)
    assert f"search: all {count} placements decided: none waits less than {name}\n" in text
    assert "Why" not in text and "best, " not in text


def test_output_describes_the_better_placement_and_reports_progress() -> None:
    mode = ForwardMode.DECODE
    scenario, costs = forward("dsv4-tiny", 4, "h200")
    told: list[tuple[int, int]] = []
    patch = limit_search_to(some(list(range(0, len(every().sizes), 397))), ORDERS)
    try:
        comparison = of_all(mode, scenario, costs, lambda *both: told.append(both))
    finally:
        patch.undo()
    assert comparison.found is not None
    text = text_of(comparison)
    assert re.search(r"decided: the best waits [\d.]+ ms less than deepseek-decode, [\d.]+ %", text)
    best = comparison.found.best
    assert f"best, {best.delta_stages} ahead: {best.describe()}\n" in text
    assert "Why: what the GPU waits for, deepseek-decode against the best" in text
    assert told == [(done, len(ORDERS)) for done in range(1, len(ORDERS) + 1)]


def test_gain_below_rounding_error_is_not_reported() -> None:
    scenario, costs = forward("dsv4-tiny", 1, "h200")
    patch = limit_search_to(some([0]), ORDERS[:1])
    try:
        comparison = of_all(ForwardMode.DECODE, scenario, costs)
    finally:
        patch.undo()
    best = comparison.best

    def told(more: float) -> str:
        pieces = [*best.turns.pieces, Piece(0.0, more, "wait", 0, 0, "all_to_all tokens")]
        slower = Run(LIKE, Turns(pieces, best.turns.seconds))
        return text_of(replace(comparison, reference=slower))

    assert "placements decided: none waits less than deepseek-decode\n" in told(1e-10)
    assert "placements decided: the best waits 0.10 ms less than deepseek-decode" in told(1e-4)


def test_layers_that_communicate_differently_are_refused() -> None:
    plain, gathers = (
        layer(0, Traffic(there, *[False] * 4), [1] * 28, [1] * 7, 1.0) for there in (False, True)
    )
    with pytest.raises(ValueError, match="layers that overlap must communicate alike"):
        line_up((plain, gathers), ORDERS[0])
