"""All legal placements: orders of a layer's operations, sets of marks, and how far one half leads.

A layer's operations are a chain except for those that can stand in several places
(``shared_experts``). A mark can follow any operation, and a half can lead by up to a layer's
stages. All layers have the same marks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from runner.model.strategy import MARK, NEEDS, OverlapStrategy

Ints = NDArray[np.int16]

OPERATIONS = len(NEEDS)
"""Operations of a layer."""


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
