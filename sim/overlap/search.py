"""Find the best of all placements by an exact search.

A few layers that repeat often (the window) give a lower bound on how long a placement waits. A
placement whose bound exceeds the total wait of the best one so far is dropped; others run in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from runner.model.strategy import OverlapStrategy
from sim.overlap.forward import Work
from sim.overlap.placements import Placements, all_choices, legal_orders, to_strategy

SLACK = 1e-12
"""Seconds by which sums of the same numbers in a different order can differ."""

_TRIED = 256
"""How many placements of an order, those with the smallest lower bounds, run first, so that a good
one rules out most others early."""

_LAYERS = 4
"""Layers of a window: enough that ignoring the layers before it hardly matters."""

_REACH = 3
"""Layers after a window whose compute can fall into it, since the first half leads."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Attributes:
        best: the placement that waits least; ties go to the fewest marks, then the smallest lead,
            then the given strategy's order of operations.
        placements: number of placements decided.
    """

    best: OverlapStrategy
    placements: int


def search(
    work: Work, like: OverlapStrategy, progress: Progress = lambda done, total: None
) -> Found:
    """Find the placement whose GPU waits least.

    Args:
        work: the forward.
        like: strategy that supplies the mode and SMs, and the order of operations in ties.
        progress: called with (orders of operations done, orders in total).
    """
    orders = sorted(legal_orders(), key=lambda order: order != like.operations)
    choices = all_choices()
    window, times = find_window(work)
    least = np.inf
    found: list[tuple[float, tuple[int, int, int, int]]] = []
    for index, order in enumerate(orders):
        placements = Placements.of(work, order, choices)
        bounds = times * placements.waits(window) if times else np.zeros(len(placements.which))
        tried = np.argsort(bounds)[:_TRIED]
        least = min(least, placements.only(tried).waits().min())
        left = placements.only(bounds <= least + SLACK)
        waits = left.waits()
        least = min(least, waits.min(initial=np.inf))
        for at in np.nonzero(waits <= least + SLACK)[0]:
            row = int(left.which[at])
            rank = int(choices.sizes[row]), int(choices.leads[row]), index, row
            found.append((float(waits[at]), rank))
        progress(index + 1, len(orders))
    *_, index, row = min(rank for waits, rank in found if waits <= least + SLACK)
    best = to_strategy(like, orders[index], choices, row)
    return Found(best, len(orders) * len(choices.sizes))


def find_window(work: Work) -> tuple[range, int]:
    """The layers that repeat most often in a row, and how often they do (0 if none repeats).

    A placement waits equally long in each repetition.
    """

    def around(first: int) -> list[object]:
        return [half[first : first + _LAYERS + _REACH] for half in work.halves]

    best, most = range(0), 0
    for first in range(len(work.layers) - _LAYERS - _REACH + 1):
        starts = range(first, len(work.layers) - _LAYERS - _REACH + 1, _LAYERS)
        times = next((n for n, at in enumerate(starts) if around(at) != around(first)), len(starts))
        if times > most:
            best, most = range(first, first + _LAYERS), times
    return best, most
