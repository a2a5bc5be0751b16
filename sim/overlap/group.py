"""Placements whose events come in one order, advanced together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sim.overlap.events import Floats, Half
from sim.overlap.placements import OPERATIONS, Ints
from sim.overlap.work import StepKind

SLACK = 1e-12
"""Seconds by which sums of the same numbers in another order may differ."""

_LOOK_EVERY = 8
"""Events after which placements that must wait too long are given up."""

Turn = tuple[int, int, int]
"""Half, layer, and which of the layer's events it is."""


@dataclass
class _State:
    """[placements] each: what they are, what their GPUs waited, and until when links are busy."""

    which: Ints
    positions: tuple[Ints, Ints]
    waited: Floats
    free: Floats
    ends: dict[tuple[int, int], Floats]

    def keep(self, kept: NDArray[np.bool_]) -> None:
        """Give the others up."""
        self.which, self.waited, self.free = self.which[kept], self.waited[kept], self.free[kept]
        self.positions = self.positions[0][:, kept], self.positions[1][:, kept]
        self.ends = {key: end[kept] for key, end in self.ends.items()}


@dataclass(frozen=True)
class Group:
    """Placements, and how far each half is when the other comes to its events.

    Attributes:
        halves: both halves.
        which: [placements] what they are called.
        ahead: [events, placements] see :meth:`Choices.ahead`.
        behind: [events, placements] see :meth:`Choices.behind`.
        passed: how many events the first half has had at each of the second's, counted from those
            of the layer.
    """

    halves: tuple[Half, Half]
    which: Ints
    ahead: Ints
    behind: Ints
    passed: tuple[int, ...]

    def only(self, kept: NDArray[np.bool_]) -> Group:
        """Some of them."""
        return replace(
            self, which=self.which[kept], ahead=self.ahead[:, kept], behind=self.behind[:, kept]
        )

    def waits_within(self, first: int, last: int) -> Floats:
        """[placements] seconds that GPUs wait in some turns at least, whatever came before.

        More of what is under way before only makes later ends later, so a wait with nothing under
        way is the least.
        """
        state = self._start(free=-np.inf)
        for turn in self.turns[first:last]:
            self._advance(state, turn)
        return state.waited

    def waiting_at_most(self, least: float) -> list[tuple[int, float]]:
        """Those that wait least of those that wait no longer than so many seconds, and how long."""
        state = self._start(free=0.0)
        for index, turn in enumerate(self.turns):
            self._advance(state, turn)
            if index % _LOOK_EVERY == _LOOK_EVERY - 1 or index == len(self.turns) - 1:
                kept = self._least_waits(state, index + 1) <= least + SLACK
                if not kept.any():
                    return []
                if not kept.all():
                    state.keep(kept)
        shortest = state.waited.min() + SLACK
        return [
            (int(state.which[at]), float(state.waited[at]))
            for at in np.nonzero(state.waited <= shortest)[0]
        ]

    @cached_property
    def turns(self) -> Sequence[Turn]:
        """Events of both halves in the order of all these placements."""
        leading = [(0, *pair) for pair in self.halves[0].every_event]
        found: list[Turn] = []
        since = 0
        for layer, index in self.halves[1].every_event:
            upto = self.passed[index] + layer * len(self.halves[0].events)
            found += leading[since:upto]
            found.append((1, layer, index))
            since = upto
        return found + leading[since:]

    def _start(self, *, free: float) -> _State:
        count = len(self.which)
        return _State(
            self.which, (self.ahead, self.behind), np.zeros(count), np.full(count, free), {}
        )

    def _advance(self, state: _State, turn: Turn) -> None:
        half, layer, index = turn
        event, other = self.halves[half].events[index], self.halves[1 - half]
        done = state.positions[half][index] + OPERATIONS * layer
        computed = other.before.take(done, mode="clip") + event.computed[layer]
        key = half, event.slot
        if event.kind is StepKind.AWAIT:
            end = state.ends.pop(key, None)
        else:
            state.free = np.maximum(state.free, computed + state.waited) + event.seconds[layer]
            end = state.free
            if event.kind is StepKind.BEGIN:
                state.ends[key] = end
                return
        if end is not None:
            state.waited = np.maximum(state.waited, end - computed)

    def _least_waits(self, state: _State, turn: int) -> Floats:
        """What GPUs wait in all at least: with what the link, or they for it, still have to do."""
        busy, blocked = self._left
        compute = sum(float(half.before[-1]) for half in self.halves)
        tail = min(half.tail for half in self.halves)
        found: Floats = np.maximum(
            state.waited + blocked[turn], state.free + busy[turn] + tail - compute
        )
        return found

    @cached_property
    def _left(self) -> tuple[Floats, Floats]:
        """[turns + 1] seconds of all collectives, and of those waited for at once, from a turn."""
        events = [(self.halves[half].events[index], layer) for half, layer, index in self.turns]
        busy = np.array([float(event.seconds[layer]) for event, layer in events])
        blocks = np.array([event.kind is StepKind.BLOCK for event, _ in events])
        return _sums_from(busy), _sums_from(busy * blocks)


def _sums_from(values: Floats) -> Floats:
    found: Floats = np.append(np.cumsum(values[::-1])[::-1], 0.0)
    return found
