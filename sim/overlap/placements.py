"""All legal placements: orders of a layer's operations, sets of marks, and one half's lead.

A layer's operations form a chain, except that ``shared_experts`` can go in several places. A mark
can follow any operation, and one half can lead by up to a layer's number of stages. All layers
have the same marks.

Compute takes equally long in every placement. A placement's waits depend only on its events (a half
begins a collective or waits for one): on the order of both halves' events, and on the compute
between them. So all placements with one order of operations are advanced together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from runner.model.strategy import MARK, NEEDS, OverlapStrategy
from sim.overlap.forward import LayerSteps, StepKind, Work

Ints = NDArray[np.int16]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

OPERATIONS = len(NEEDS)
"""Number of operations in a layer."""

_BLOCK = 2048
"""Placements that are advanced together: as many as fit into a core's cache."""


def legal_orders(order: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every order that starts with ``order`` and puts each operation after those that it needs."""
    if len(order) == OPERATIONS:
        yield order
    for name, needs in NEEDS.items():
        if name not in order and all(need in order for need in needs):
            yield from legal_orders((*order, name))


@dataclass(frozen=True)
class Choices:
    """Sets of marks, each with a lead.

    Attributes:
        marks: [choices, OPERATIONS] number of a layer's operations before each mark, ascending;
            padded with zeros at the end.
        sizes: [choices] number of marks.
        leads: [choices] number of stages that the first half is ahead.
    """

    marks: Ints
    sizes: Ints
    leads: Ints

    def ahead(self, op: int) -> Ints:
        """How far the second half is when the first half reaches an operation of a layer.

        Returns:
            [choices] operations done since the start of that layer; negative in earlier layers.
            Beyond the forward's ends, the second half has done nothing or everything.
        """
        return self._end_of(self._stages[op] - self.leads - 1)

    def behind(self, op: int) -> Ints:
        """How far the first half is (at a stage's end) when the second reaches an operation."""
        return self._end_of(self._stages[op] + self.leads)

    @cached_property
    def _stages(self) -> Ints:
        """[OPERATIONS, choices] the stage of each operation, counted within its layer."""
        padding = OPERATIONS - self.sizes  # zeros count as marks before every operation
        marks_before = [(self.marks <= op).sum(axis=1) - padding for op in range(OPERATIONS)]
        return np.stack(marks_before).astype(np.int16)

    def _end_of(self, stage: Ints) -> Ints:
        """The end of a stage, in operations since the start of the layer."""
        layer, mark = np.divmod(stage, self.sizes)
        found: Ints = OPERATIONS * layer + self.marks[np.arange(len(stage)), mark]
        return found


def all_choices() -> Choices:
    """Every set of marks except the empty one, with every lead; fewer marks come first."""
    masks = np.arange(1, 1 << OPERATIONS)
    bits = (masks[:, None] >> np.arange(OPERATIONS)) & 1
    marks, sizes, leads = [], [], []
    for size in range(1, OPERATIONS + 1):
        chosen = np.nonzero(bits[bits.sum(axis=1) == size])[1].reshape(-1, size) + 1
        padded = np.pad(chosen, ((0, 0), (0, OPERATIONS - size)))
        for lead in range(size + 1):
            marks.append(padded)
            sizes.append(np.full(len(padded), size))
            leads.append(np.full(len(padded), lead))
    return Choices(*(np.concatenate(parts).astype(np.int16) for parts in (marks, sizes, leads)))


def to_strategy(
    like: OverlapStrategy, order: tuple[str, ...], choices: Choices, at: int
) -> OverlapStrategy:
    """Make a strategy from a placement, with the mode and SMs of ``like``."""
    after = set(choices.marks[at, : choices.sizes[at]].tolist())
    steps: list[str] = []
    for index, name in enumerate(order, start=1):
        steps += (name, MARK) if index in after else (name,)
    lead = int(choices.leads[at])
    return replace(like, name="best of all", steps=tuple(steps), delta_stages=lead)


@dataclass(frozen=True)
class Half:
    """One half's compute, and its events in every layer.

    Attributes:
        before: [layers x OPERATIONS + 1] seconds of this half's compute before each operation.
        ops: [events] index in the order of the operation with each event of a layer.
        kinds: [events] kind of each event; a BLOCK begins a collective and waits for it.
        collectives: [events] index of the event's collective in the layer.
        computed: [events, layers] seconds of this half's compute before each event.
        seconds: [events, layers] duration of the collective; 0 for an AWAIT.
    """

    before: Floats
    ops: tuple[int, ...]
    kinds: tuple[StepKind, ...]
    collectives: tuple[int, ...]
    computed: Floats
    seconds: Floats

    def events_before(self, done: Ints) -> Ints:
        """Number of events in the first ``done`` operations, which can span several layers."""
        layers, rest = np.divmod(done, OPERATIONS)
        within = np.searchsorted(self.ops, np.arange(OPERATIONS)).astype(np.int16)
        found: Ints = len(self.ops) * layers + within[rest]
        return found


def line_up(layers: Sequence[LayerSteps], order: Sequence[str]) -> Half:
    """Sum up a half's compute, and align its events across the layers.

    Raises:
        ValueError: layers communicate differently.
    """
    at = 0.0
    before, times = [at], []
    events: list[list[tuple[int, StepKind, str]]] = []
    for layer in layers:
        events.append([])
        for op, name in enumerate(order):
            for step in layer[name]:
                if step.kind is StepKind.COMPUTE:
                    at += step.seconds
                else:
                    events[-1].append((op, step.kind, step.name))
                    times.append((at, step.seconds))
            before.append(at)
    if any(its != events[0] for its in events):
        raise ValueError("layers that overlap must communicate alike")
    ops, kinds, names = zip(*events[0], strict=True)
    distinct = list(dict.fromkeys(names))
    computed, seconds = np.array(times).reshape(len(layers), len(ops), 2).T
    return Half(np.array(before), ops, kinds, tuple(map(distinct.index, names)), computed, seconds)


@dataclass(frozen=True)
class Placements:
    """Distinct placements: at some event of one half, the other half's progress differs.

    Attributes:
        halves: both halves, aligned.
        which: [placements] row of each placement among all choices.
        done: [events of the first half, then of the second; placements] progress of the other
            half; see :meth:`Choices.ahead` and :meth:`Choices.behind`.
    """

    halves: tuple[Half, Half]
    which: NDArray[np.intp]
    done: Ints

    @classmethod
    def of(cls, work: Work, order: Sequence[str], choices: Choices) -> Placements:
        """The placements of one order; of equal placements, only the first choice."""
        first, second = (line_up(half, order) for half in work.halves)
        done = [*map(choices.ahead, first.ops), *map(choices.behind, second.ops)]
        stacked = np.stack(done)
        which = np.lexsort(stacked)  # stable: the first of equal placements stays first
        differs = (np.diff(stacked[:, which], axis=1) != 0).any(axis=0)
        which = np.sort(which[np.append(True, differs)])
        return cls((first, second), which, stacked[:, which])

    def only(self, kept: Flags | NDArray[np.intp]) -> Placements:
        return replace(self, which=self.which[kept], done=self.done[:, kept])

    def waits(self, window: range | None = None) -> Floats:
        """[placements] seconds that the GPU waits.

        Args:
            window: count only waits while the second half runs these layers, as if nothing had
                been under way before. Anything under way can only delay later ends, so this is a
                lower bound. Needs two more layers after the window.
        """
        blocks = [
            self.only(np.arange(at, min(at + _BLOCK, len(self.which))))._advance(window)
            for at in range(0, len(self.which), _BLOCK)
        ]
        return np.concatenate(blocks) if blocks else np.zeros(0)

    def _advance(self, window: range | None) -> Floats:
        first, second = self.halves
        columns = np.arange(len(self.which))
        is_second, slot, layer = self._turns(window)
        layers = first.computed.shape[1]
        done = np.clip(self.done[slot, columns] + OPERATIONS * layer, 0, OPERATIONS * layers)
        compute_of_other = np.stack([second.before, first.before])[is_second.view(np.int8), done]
        computed = np.concatenate([first.computed, second.computed])[slot, layer]
        computed += compute_of_other
        seconds = np.concatenate([first.seconds, second.seconds])[slot, layer]
        kinds = [*first.kinds, *second.kinds]
        awaits = np.array([kind is StepKind.AWAIT for kind in kinds])[slot]
        begins = np.array([kind is StepKind.BEGIN for kind in kinds])[slot]
        its_first = 1 + max(first.collectives)
        names = [*first.collectives, *(its_first + name for name in second.collectives)]
        collective = np.array(names)[slot]
        # How long the GPU has waited, when the link is free, and when each collective ends.
        waited = np.zeros(len(columns))
        free = np.full(len(columns), 0.0 if window is None else -np.inf)
        ends = np.full((1 + max(names), len(columns)), -np.inf)
        for turn in range(len(slot)):
            ended = np.maximum(free, computed[turn] + waited) + seconds[turn]
            free = np.where(awaits[turn], free, ended)
            end = np.where(awaits[turn], ends[collective[turn], columns], ended)
            ends[collective[turn], columns] = end
            later = np.maximum(waited, end - computed[turn])
            waited = np.where(begins[turn], waited, later)
        return waited

    def _turns(self, window: range | None) -> tuple[Flags, Ints, Ints]:
        """[turns, placements] if the event is the second half's, its row in ``done``, its layer.

        A half's events keep their order; ``done`` says where the other half's come in between.
        """
        first, second = self.halves
        (events, layers), its_events = first.computed.shape, len(second.ops)
        its_layers = range(layers) if window is None else window
        # Number of the first half's events before each event of the second half.
        layer, event = np.divmod(_count(its_events * len(its_layers)), its_events)
        passed = first.events_before(self.done[events:])[event[:, 0]]
        passed = np.clip(passed + events * (layer + its_layers.start), 0, events * layers)
        start = np.zeros_like(passed[0]) if window is None else passed[0]
        turns = passed - start + _count(len(passed))
        is_second = np.zeros(((events + its_events) * len(its_layers), len(start)), bool)
        is_second[turns, np.arange(len(start))] = True
        second_had = np.cumsum(is_second, axis=0, dtype=np.int16) - is_second
        first_had = start + _count(len(is_second)) - second_had
        layer, event = np.divmod(first_had, np.int16(events))
        its_layer, its_event = np.divmod(second_had, np.int16(its_events))
        its_layer += its_layers.start
        return (
            is_second,
            np.where(is_second, events + its_event, event),
            np.where(is_second, its_layer, layer),
        )


def _count(number: int) -> Ints:
    """0, 1, 2 and so on, as a column."""
    return np.arange(number, dtype=np.int16)[:, None]
