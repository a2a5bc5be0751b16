"""Layers that come again and again: what a placement waits in them once, it waits each time."""

from __future__ import annotations

from dataclasses import dataclass

from sim.overlap.events import Half
from sim.overlap.work import Work

_LAYERS = 4
"""Layers of a window: enough that what it does not know of the layers before hardly matters."""

_REACH = 2
"""Layers around a window whose compute may be beside it: a half leads by up to two."""


@dataclass(frozen=True)
class Window:
    """Layers whose like come several times.

    Attributes:
        first: the first of them.
        times: how often they, and those around them, come one after the other.
    """

    first: int
    times: int

    def turns(self, halves: tuple[Half, Half]) -> tuple[int, int]:
        """First turn of the window, and the first one after it."""
        of_layer = sum(len(half.events) for half in halves)
        return of_layer * self.first, of_layer * (self.first + _LAYERS)


def find_window(work: Work) -> Window | None:
    """The window that comes most often; None where there are too few layers."""
    best: Window | None = None
    for first in range(_REACH, len(work.layers) - _LAYERS - _REACH + 1):
        times = _times(work, first)
        if best is None or times > best.times:
            best = Window(first, times)
    return best


def _times(work: Work, first: int) -> int:
    around = _around(work, first)
    count, at = 0, first
    while at + _LAYERS + _REACH <= len(work.layers) and _around(work, at) == around:
        count += 1
        at += _LAYERS
    return count


def _around(work: Work, first: int) -> list[object]:
    return [half[first - _REACH : first + _LAYERS + _REACH] for half in work.halves]
