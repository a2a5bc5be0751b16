"""One half's forward as events and the compute between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sim.overlap.placements import OPERATIONS, Ints
from sim.overlap.work import LayerSteps, StepKind, Work

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Event:
    """A collective that a layer begins or waits for.

    Attributes:
        kind: what it is; a BLOCK is begun and waited for at once.
        slot: which of the layer's collectives it is.
        op: operation that it is in, by its place in the order.
        computed: [layers] seconds of this half's compute before it.
        seconds: [layers] how long it takes; 0 of an AWAIT.
    """

    kind: StepKind
    slot: int
    op: int
    computed: Floats
    seconds: Floats


@dataclass(frozen=True)
class Half:
    """One half.

    Attributes:
        before: [layers x operations + 1] seconds of its compute before each operation.
        events: of each layer, in order.
        layers: how many.
    """

    before: Floats
    events: tuple[Event, ...]
    layers: int

    @property
    def tail(self) -> float:
        """Seconds of compute after its last event."""
        return float(self.before[-1] - self.events[-1].computed[-1])

    @cached_property
    def _events_within(self) -> Ints:
        """[operations] events of a layer before each of its operations."""
        ops = [event.op for event in self.events]
        return np.array([sum(op < at for op in ops) for at in range(OPERATIONS)], dtype=np.int32)

    @cached_property
    def every_event(self) -> list[tuple[int, int]]:
        """Layer and place in it of all events of all layers."""
        return [(layer, index) for layer in range(self.layers) for index in range(len(self.events))]

    def events_before(self, done: Ints) -> Ints:
        """How many events are among the operations that are done, those of whole layers too."""
        layers, rest = np.divmod(done, OPERATIONS)
        found: Ints = len(self.events) * layers + self._events_within[rest]
        return found


def line_up(work: Work, half: int, order: Sequence[str]) -> Half:
    """Sum a half's compute up and line its events up over the layers.

    Raises:
        ValueError: layers differ in what they communicate.
    """
    before, found = [0.0], []
    for layer in work.halves[half]:
        events = _events_of(layer, order, before)
        found.append(events)
    names = [[(kind, name, op) for kind, name, op, *_ in events] for events in found]
    if any(its != names[0] for its in names):
        raise ValueError("layers that overlap must communicate alike")
    slots = list(dict.fromkeys(name for _, name, _ in names[0]))
    return Half(
        np.array(before),
        tuple(
            Event(
                kind,
                slots.index(name),
                op,
                np.array([its[index][3] for its in found]),
                np.array([its[index][4] for its in found]),
            )
            for index, (kind, name, op) in enumerate(names[0])
        ),
        len(found),
    )


def _events_of(
    layer: LayerSteps, order: Sequence[str], before: list[float]
) -> list[tuple[StepKind, str, int, float, float]]:
    """A layer's events; ``before`` grows by its operations."""
    events: list[tuple[StepKind, str, int, float, float]] = []
    at = before[-1]
    for op, name in enumerate(order):
        for step in layer[name]:
            if step.kind is StepKind.COMPUTE:
                at += step.seconds
            else:
                events.append((step.kind, step.name, op, at, step.seconds))
        before.append(at)
    return events
