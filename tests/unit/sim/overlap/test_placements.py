"""Search space of overlap strategies: operation orders, stage marks and leads."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.backend.forward_batch import ForwardMode
from runner.errors import UserError
from runner.model.operations import cut_stages, overlapped_order
from runner.model.strategy import MARK, NEEDS, STRATEGIES, OverlapStrategy, load_strategy
from sim.overlap.placements import OPERATIONS, Choices, all_choices, legal_orders, to_strategy

ORDERS = list(legal_orders())
LAYERS = 4


def one_choice(marks: set[int], lead: int) -> Choices:
    padded = [*sorted(marks), *[0] * (OPERATIONS - len(marks))]
    return Choices(*(np.array([its], dtype=np.int16) for its in (padded, len(marks), lead)))


@st.composite
def placements(draw: st.DrawFn) -> tuple[tuple[str, ...], set[int], int]:
    marks = draw(st.sets(st.integers(1, OPERATIONS), min_size=1))
    return draw(st.sampled_from(ORDERS)), marks, draw(st.integers(0, len(marks)))


def accepted(order: tuple[str, ...]) -> bool:
    try:
        OverlapStrategy("any", ForwardMode.DECODE, order, 0)
    except UserError:
        return False
    return True


def test_legal_orders_are_those_that_a_strategy_accepts() -> None:
    """Tried: one operation moved, or three neighbours of a legal order permuted."""
    assert len(ORDERS) == len(set(ORDERS)) == 7
    others = [name for name in NEEDS if name != "shared_experts"]
    tried = {(*others[:at], "shared_experts", *others[at:]) for at in range(OPERATIONS)}
    for order in ORDERS:
        for first in range(OPERATIONS - 2):
            for three in permutations(order[first : first + 3]):
                tried.add((*order[:first], *three, *order[first + 3 :]))
    assert {order for order in tried if accepted(order)} == set(ORDERS)


def test_all_choices_has_every_set_of_marks_with_every_lead() -> None:
    """Sorted by number of marks, then by lead."""
    choices = all_choices()
    masks = np.where(choices.marks > 0, 1 << choices.marks.astype(int), 0).sum(axis=1)
    sizes = np.array([mask.bit_count() for mask in masks.tolist()])
    assert (sizes == choices.sizes).all()
    assert (choices.leads >= 0).all() and (choices.leads <= choices.sizes).all()
    pairs = masks * (OPERATIONS + 1) + choices.leads
    # A set of s marks has s + 1 leads: (n / 2 + 1) 2^n in total, minus 1 for the empty set.
    expected = (OPERATIONS // 2 + 1) * 2**OPERATIONS - 1
    assert len(np.unique(pairs)) == len(pairs) == expected
    assert len(ORDERS) * expected == 917_497
    ranks = choices.sizes * (OPERATIONS + 1) + choices.leads
    assert (np.diff(ranks) >= 0).all()
    inside = np.arange(OPERATIONS - 1) < choices.sizes[:, None] - 1
    assert (np.diff(choices.marks, axis=1)[inside] > 0).all()


@pytest.mark.parametrize("name", STRATEGIES)
def test_named_strategies_are_in_the_search_space(name: str) -> None:
    strategy = STRATEGIES[name]
    assert strategy.operations in ORDERS
    where = [at for at, step in enumerate(strategy.steps) if step == MARK]
    marks = {at - index for index, at in enumerate(where)}
    assert strategy.delta_stages <= len(marks)
    choice = one_choice(marks, strategy.delta_stages)
    made = to_strategy(strategy, strategy.operations, choice, 0)
    assert made.steps == strategy.steps
    assert made.to_json() == {**strategy.to_json(), "name": "best of all"}


def progress_of_other_half(strategy: OverlapStrategy) -> dict[tuple[int, int], int]:
    """For each (half, operation): how many operations the other half has finished by then."""
    place = {name: index for index, name in enumerate(strategy.operations)}
    stages = cut_stages(
        MARK if step == MARK else layer * OPERATIONS + place[step]
        for layer in range(LAYERS)
        for step in strategy.steps
    )
    done, found = [0, 0], {}
    for half, stage in overlapped_order(len(stages), strategy.delta_stages):
        for operation in stages[stage]:
            assert operation == done[half]
            found[half, done[half]] = done[1 - half]
            done[half] += 1
    assert done == [LAYERS * OPERATIONS] * 2
    return found


@settings(deadline=None)
@given(placements())
def test_ahead_and_behind_match_the_executed_order(
    placement: tuple[tuple[str, ...], set[int], int],
) -> None:
    order, marks, lead = placement
    choices = one_choice(marks, lead)
    run = progress_of_other_half(to_strategy(STRATEGIES["deepseek-decode"], order, choices, 0))
    for op in range(OPERATIONS):
        (ahead,), (behind,) = choices.ahead(op).tolist(), choices.behind(op).tolist()
        for layer in range(LAYERS):
            start, last = layer * OPERATIONS, LAYERS * OPERATIONS
            assert run[0, start + op] == min(max(start + ahead, 0), last)
            assert run[1, start + op] == min(max(start + behind, 0), last)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(placements(), st.sampled_from(list(STRATEGIES.values())), st.integers(0, 40))
def test_placement_round_trips_through_toml_and_json(
    tmp_path: Path,
    placement: tuple[tuple[str, ...], set[int], int],
    named: OverlapStrategy,
    sms: int,
) -> None:
    order, marks, lead = placement
    like = OverlapStrategy("like", named.mode, named.steps, named.delta_stages, sms)
    strategy = to_strategy(like, order, one_choice(marks, lead), 0)
    assert (strategy.operations, strategy.delta_stages) == (order, lead)
    assert (strategy.mode, strategy.comm_sms) == (named.mode, sms)
    stages = cut_stages(step if step == MARK else (step,) for step in strategy.steps)
    assert strategy.steps.count(MARK) == len(stages) - (OPERATIONS not in marks)
    path = tmp_path / f"{strategy.name}.toml"
    path.write_text(strategy.to_toml())
    assert load_strategy(str(path)) == strategy
    assert OverlapStrategy.from_json(strategy.to_json()) == strategy
