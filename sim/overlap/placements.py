"""All legal placements: orders of a layer's operations, sets of marks, and how far one half leads.

A layer's operations are a chain but for those that may stand in several places
(``shared_experts``); a mark may stand behind any operation; and a half may lead by up to a layer's
stages. The marks of all layers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runner.model.strategy import MARK, NEEDS, OverlapStrategy

Ints = NDArray[np.int32]

BEST = "best of all"
"""Name of the placement that a search found."""

OPERATIONS = len(NEEDS)
"""Operations of a layer."""


def legal_orders() -> Iterator[tuple[str, ...]]:
    """Every order in which each operation comes after those that it needs."""
    yield from _continued(())


def _continued(order: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if len(order) == len(NEEDS):
        yield order
    for name, needs in NEEDS.items():
        if name not in order and all(need in order for need in needs):
            yield from _continued((*order, name))


@dataclass(frozen=True)
class Choices:
    """Sets of marks, each with a lead.

    Attributes:
        marks: [choices, operations] how many operations of a layer are before each mark,
            ascending; filled up with zeros.
        sizes: [choices] how many marks.
        leads: [choices] stages that the first half is ahead.
    """

    marks: Ints
    sizes: Ints
    leads: Ints

    def ahead(self, op: int) -> Ints:
        """What the second half has done when the first comes to an operation.

        Returns:
            [choices] operations since the start of the layer that the first half is in; negative
            ones are layers before. Beyond the forward's ends it has done nothing, or all.
        """
        return self._end_of(self._stage(op) - self.leads - 1)

    def behind(self, op: int) -> Ints:
        """The same of the first half when the second comes to an operation: its stage is done."""
        return self._end_of(self._stage(op) + self.leads)

    def _stage(self, op: int) -> Ints:
        """Stage of an operation, counted from the one that its layer begins in."""
        # Zeros that fill up count as marks too; there are as many as a row lacks marks.
        found: Ints = (self.marks <= op).sum(axis=1) - (OPERATIONS - self.sizes)
        return found

    def _end_of(self, stage: Ints) -> Ints:
        """Where a stage ends, in operations since the start of the layer."""
        layer, mark = np.divmod(stage, self.sizes)
        found: Ints = OPERATIONS * layer + self.marks[np.arange(len(stage)), mark]
        return found


def all_choices() -> Choices:
    """Every set of marks but the empty one, with every lead; those with fewer marks first."""
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
    return Choices(*(np.concatenate(parts).astype(np.int32) for parts in (marks, sizes, leads)))


def to_strategy(
    like: OverlapStrategy, order: tuple[str, ...], choices: Choices, at: int
) -> OverlapStrategy:
    """A placement as a strategy, for the mode and with the SMs of another."""
    after = set(choices.marks[at, : choices.sizes[at]].tolist())
    steps = [
        step
        for index, name in enumerate(order, start=1)
        for step in ((name, MARK) if index in after else (name,))
    ]
    lead = int(choices.leads[at])
    return replace(like, name=BEST, steps=tuple(steps), delta_stages=lead)
