"""All legal placements: orders of a layer's operations, sets of marks, and how far one half leads.

A layer's operations are a chain except for those that can stand in several places
(``shared_experts``). A mark can follow any operation, and a half can lead by up to a layer's
stages. All layers have the same marks.

Compute takes as long in every placement. What a placement waits depends only on its events
(collectives that a half begins or waits for): on the order of both halves' events, and on the
compute between them. So placements over one order of operations are advanced together.
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
"""Operations of a layer."""

_BLOCK = 2048
"""Placements that are advanced together: as many as a core's cache can hold."""


def legal_orders(order: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every order that continues ``order`` and puts each operation after those that it needs."""
    if len(order) == OPERATIONS:
        yield order
    for name, needs in NEEDS.items():
        if name not in order and all(need in order for need in needs):
            yield from legal_orders((*order, name))


@dataclass(frozen=True)
class Choices:
    """Sets of marks, each with a lead.

    Attributes:
        marks: [choices, OPERATIONS] how many operations of a layer come before each mark,
            ascending; padded with zeros at the end.
        sizes: [choices] how many marks.
        leads: [choices] how many stages the first half is ahead.
    """

    marks: Ints
    sizes: Ints
    leads: Ints

    def ahead(self, op: int) -> Ints:
        """How far the second half is when the first comes to an operation of a layer.

        Returns:
            [choices] operations that it has done since the start of that layer; negative numbers
            are earlier layers. Beyond the forward's ends it has done nothing, or everything.
        """
        return self._end_of(self._stages[op] - self.leads - 1)

    def behind(self, op: int) -> Ints:
        """How far the first half is when the second comes to an operation: its stage is done."""
        return self._end_of(self._stages[op] + self.leads)

    @cached_property
    def _stages(self) -> Ints:
        """[OPERATIONS, choices] the stage of each operation, counted from its layer's first."""
        padding = OPERATIONS - self.sizes  # zeros count as marks before every operation
        marks_before = [(self.marks <= op).sum(axis=1) - padding for op in range(OPERATIONS)]
        return np.stack(marks_before).astype(np.int16)

    def _end_of(self, stage: Ints) -> Ints:
        """Where a stage ends, in operations since the start of the layer."""
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
    """A placement as a strategy with the mode and the SMs of another one."""
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
        before: [layers x OPERATIONS + 1] seconds of its compute before each operation.
        ops: [events] the operation of each event of a layer, by its place in the order.
        kinds: [events] what each event is; a BLOCK begins and waits at once.
        collectives: [events] which of the layer's collectives it is.
        computed: [events, layers] seconds of this half's compute before each event.
        seconds: [events, layers] how long a collective takes; 0 for an AWAIT.
    """

    before: Floats
    ops: tuple[int, ...]
    kinds: tuple[StepKind, ...]
    collectives: tuple[int, ...]
    computed: Floats
    seconds: Floats

    def events_before(self, done: Ints) -> Ints:
        """How many events lie in ``done`` operations, which can span several layers."""
        layers, rest = np.divmod(done, OPERATIONS)
        within = np.searchsorted(self.ops, np.arange(OPERATIONS)).astype(np.int16)
        found: Ints = len(self.ops) * layers + within[rest]
        return found


def line_up(layers: Sequence[LayerSteps], order: Sequence[str]) -> Half:
    """Sum up a half's compute, and line its events up over the layers.

    Raises:
        ValueError: layers differ in what they communicate.
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
    """Placements that differ in how far one half is at some event of the other.

    Attributes:
        halves: both halves, lined up.
        which: [placements] their rows among all choices.
        done: [events of the first half, then of the second; placements] how far the other half
            is; see :meth:`Choices.ahead` and :meth:`Choices.behind`.
    """

    halves: tuple[Half, Half]
    which: NDArray[np.intp]
    done: Ints

    @classmethod
    def of(cls, work: Work, order: Sequence[str], choices: Choices) -> Placements:
        """Those of one order; of placements that do not differ, the first choice."""
        first, second = (line_up(half, order) for half in work.halves)
        done = [*map(choices.ahead, first.ops), *map(choices.behind, second.ops)]
        stacked = np.stack(done)
        which = np.lexsort(stacked)  # stable, so that the first of equal ones stays the first
        differs = (np.diff(stacked[:, which], axis=1) != 0).any(axis=0)
        which = np.sort(which[np.append(True, differs)])
        return cls((first, second), which, stacked[:, which])

    def only(self, kept: Flags | NDArray[np.intp]) -> Placements:
        return replace(self, which=self.which[kept], done=self.done[:, kept])

    def waits(self, window: range | None = None) -> Floats:
        """[placements] seconds that the GPU waits.

        Args:
            window: count only while the second half runs these layers, as if nothing had been
                under way before. What is under way can only delay later ends, so this is the
                least that the GPU waits there. Needs two more layers after the window.
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
        # What the GPU has waited, when the link is free, and when each collective ends.
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
        """[turns, placements] whether the second half has an event, its row in ``done``, its layer.

        A half's events come in its own order; ``done`` says when those of the other come between.
        """
        first, second = self.halves
        (events, layers), its_events = first.computed.shape, len(second.ops)
        its_layers = range(layers) if window is None else window
        # Events that the first half has had before each event of the second half.
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
    """0, 1, 2 and so on as a column."""
    return np.arange(number, dtype=np.int16)[:, None]
