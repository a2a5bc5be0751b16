"""The best of all placements, exactly: every one is decided.

A few layers that come again and again (the window) say how long a placement waits at least. Those
that wait longer there than the best one does in all are given up; the others run as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from runner.model.strategy import OverlapStrategy
from sim.overlap.forward import Work
from sim.overlap.placements import Placements, all_choices, legal_orders, to_strategy

SLACK = 1e-12
"""Seconds by which sums of the same numbers in another order can differ."""

_TRIED = 256
"""Placements of an order, those with the smallest lower bounds, that run first to find one that
rules most others out."""

_LAYERS = 4
"""Layers of a window: enough that what it does not know of the layers before hardly matters."""

_REACH = 3
"""Layers that follow a window and whose compute can fall into it, since the first half leads."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Attributes:
        best: the placement that waits least; of several the one with the fewest marks, then the
            smallest lead, then the order of operations that the named strategy has.
        placements: how many were decided.
    """

    best: OverlapStrategy
    placements: int


def search(
    work: Work, like: OverlapStrategy, progress: Progress = lambda done, total: None
) -> Found:
    """Find the placement whose GPU waits least.

    Args:
        work: the forward.
        like: the strategy whose mode, SMs and, among equals, order the result has.
        progress: called with the orders of operations done, and all of them.
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
    """The layers whose like come most often one after the other, and how often; at worst 0 times.

    What a placement waits in them once, it waits each time.
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
