"""The best of all placements, exactly: every one is decided.

Compute takes the same time in every placement, so the best is the one whose GPU waits least. Of a
placement only the order of events (collectives that begin or end) among both halves and the compute
between them matters: placements that agree in both are one, and those that agree in the order of
events are advanced together. Most are given up by what they wait in a few layers that come again
and again (:mod:`sim.overlap.window`), the others once they must wait longer than the best one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runner.model.strategy import OverlapStrategy
from sim.overlap.events import Floats, Half, line_up
from sim.overlap.group import SLACK, Group
from sim.overlap.placements import Choices, Ints, all_choices, legal_orders, to_strategy
from sim.overlap.turns import run_in_turns
from sim.overlap.window import Window, find_window
from sim.overlap.work import Work

_TRIED = 16
"""Placements that are run as a whole to find one to hold all others against."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Attributes:
        best: the placement that waits least; of several the one with fewest marks, then the
            least lead, then the order of operations that is most like the named strategy's.
        placements: how many were decided.
        waits: seconds that the GPU waits in the overlapped layers of the best one.
    """

    best: OverlapStrategy
    placements: int
    waits: float


@dataclass(frozen=True)
class _Candidates:
    """A group of placements over one order, and what each waits at least."""

    order: int
    group: Group
    bounds: Floats


def search(
    work: Work, like: OverlapStrategy, progress: Progress = lambda done, total: None
) -> Found:
    """Find the placement whose GPU waits least.

    Args:
        work: the forward.
        like: whose mode and SMs the result has.
        progress: told (orders of operations done, twice all of them).
    """
    orders = sorted(legal_orders(), key=lambda order: order != like.operations)
    choices = all_choices()
    window = find_window(work)
    candidates: list[_Candidates] = []
    for index, order in enumerate(orders):
        halves = line_up(work, 0, order), line_up(work, 1, order)
        candidates += [
            _Candidates(index, group, _bounds(group, window)) for group in _groups(halves, choices)
        ]
        progress(index + 1, 2 * len(orders))

    def strategy(order: int, at: int) -> OverlapStrategy:
        return to_strategy(like, orders[order], choices, at)

    least = min(waits_of(work, strategy(*pair)) for pair in _most_promising(candidates))
    best: tuple[tuple[int, int, int], int] | None = None
    for one in candidates:
        kept = one.bounds <= least + SLACK
        if not kept.any():
            continue
        for at, waits in one.group.only(kept).waiting_at_most(least):
            rank = (int(choices.sizes[at]), int(choices.leads[at]), one.order)
            if best is None or waits < least - SLACK or rank < best[0]:
                best = rank, at
            least = min(least, waits)
        progress(len(orders) + one.order + 1, 2 * len(orders))
    assert best is not None, "what the others are held against is among them"
    return Found(strategy(best[0][2], best[1]), len(orders) * len(choices.sizes), least)


def waits_of(work: Work, strategy: OverlapStrategy) -> float:
    """Seconds that the GPU waits in the overlapped layers."""
    inner = Work(work.mode, work.comm_sms, (), work.halves, (), work.layers)
    return run_in_turns(inner, strategy).exposed


def _bounds(group: Group, window: Window | None) -> Floats:
    if window is None:
        return np.zeros(len(group.which))
    return window.times * group.waits_within(*window.turns(group.halves))


def _most_promising(candidates: list[_Candidates]) -> Iterator[tuple[int, int]]:
    """Order and name of those that wait least at least, the best of a group each."""
    found = [
        (float(one.bounds.min()), one.order, int(one.group.which[one.bounds.argmin()]))
        for one in candidates
    ]
    for _, order, at in sorted(found)[:_TRIED]:
        yield order, at


def _groups(halves: tuple[Half, Half], choices: Choices) -> Iterator[Group]:
    """Placements that differ, by the order of their events."""
    ahead = np.stack([choices.ahead(event.op) for event in halves[0].events])
    behind = np.stack([choices.behind(event.op) for event in halves[1].events])
    passed = halves[0].events_before(behind)
    order: Ints = np.lexsort(np.concatenate([ahead, behind, passed])).astype(np.int32)
    order = order[_first_of_equal(np.concatenate([ahead, behind])[:, order])]
    edges = np.nonzero(_first_of_equal(passed[:, order]))[0]
    for its in np.split(order, edges[1:]):
        counts = tuple(passed[:, its[0]].tolist())
        yield Group(halves, its, ahead[:, its], behind[:, its], counts)


def _first_of_equal(columns: Ints) -> NDArray[np.bool_]:
    """Which columns differ from the one before."""
    differ = (np.diff(columns, axis=1) != 0).any(axis=0)
    return np.concatenate([[True], differ])
