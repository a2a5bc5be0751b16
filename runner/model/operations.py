"""A layer's forward as a list of named operations with yield marks, and its plain execution.

Names and order follow SGLang's two-batch-overlap operations. Marks cut the list into stages.
:func:`execute_operations` runs one batch and only records the marks;
:func:`execute_overlapped_operations` runs two batches over the same stages, one stage of each in
turn, so that what one has begun to communicate goes on while the other computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class OperationState:
    """What operations of one batch hand to each other.

    A value is put once and taken once: putting over a value, taking what is not there, and
    leaving values behind are errors of the operations' author, not of the user.
    """

    def __init__(self, **values: Any) -> None:
        self._values = dict(values)

    def put(self, **values: Any) -> None:
        """Hand values on under new names."""
        for name, value in values.items():
            if name in self._values:
                raise RuntimeError(f"operation overwrites state {name!r}")
            self._values[name] = value

    def take(self, name: str) -> Any:
        """Take a value away."""
        if name not in self._values:
            raise RuntimeError(f"operation needs state {name!r}, which nothing has put")
        return self._values.pop(name)

    def peek(self, name: str) -> Any:
        """Look at a value and leave it."""
        if name not in self._values:
            raise RuntimeError(f"operation needs state {name!r}, which nothing has put")
        return self._values[name]

    def replace(self, **values: Any) -> None:
        """Take the old values and put new ones under the same names."""
        for name in values:
            self.take(name)
        self.put(**values)

    def finish(self, *kept: str) -> list[Any]:
        """The values named, which must be all that is left."""
        left = set(self._values) - set(kept)
        if left:
            raise RuntimeError(f"operations left state behind: {', '.join(sorted(left))}")
        return [self.take(name) for name in kept]


@dataclass(frozen=True)
class Operation:
    """One named step of a layer."""

    name: str
    run: Callable[[OperationState], None]


@dataclass(frozen=True)
class YieldOperation:
    """A mark at which an overlapped execution may switch to the other batch."""


Step = Operation | YieldOperation


Stage = tuple[Operation, ...]


def cut_stages(steps: Iterable[Step]) -> list[Stage]:
    """The operations between the marks; marks with nothing between them are one."""
    stages: list[list[Operation]] = [[]]
    for step in steps:
        if isinstance(step, Operation):
            stages[-1].append(step)
        elif stages[-1]:
            stages.append([])
    return [tuple(stage) for stage in stages if stage]


def overlapped_order(num_stages: int, delta_stages: int) -> list[tuple[int, int]]:
    """(batch, stage) in the order in which two batches run them.

    The first batch runs ``delta_stages`` stages alone, then both take turns, then the second
    batch ends alone.

    Raises:
        ValueError: ``delta_stages`` is not in 0..num_stages.
    """
    if not 0 <= delta_stages <= num_stages:
        raise ValueError(f"delta_stages={delta_stages} must lie in 0..{num_stages}, the stages")
    order = [(0, stage) for stage in range(delta_stages)]
    for stage in range(num_stages - delta_stages):
        order += [(0, delta_stages + stage), (1, stage)]
    return order + [(1, stage) for stage in range(num_stages - delta_stages, num_stages)]


def execute_overlapped_operations(
    states: tuple[OperationState, OperationState],
    stages: tuple[Sequence[Stage], Sequence[Stage]],
    delta_stages: int,
    mark: Callable[[str, str], None],
) -> None:
    """Run two batches in turns.

    Args:
        states: each batch's own; nothing goes from one to the other.
        stages: each batch's stages, of which both have the same number.
        delta_stages: how many stages the first batch is ahead.
        mark: told ``("batch", "0" or "1")`` before each stage, and ``("batch", "both")`` after all.

    Raises:
        ValueError: numbers of stages that differ, or a delta beyond them.
    """
    if len(stages[0]) != len(stages[1]):
        raise ValueError(
            f"the batches have {len(stages[0])} and {len(stages[1])} stages: they must agree"
        )
    for batch, stage in overlapped_order(len(stages[0]), delta_stages):
        mark("batch", str(batch))
        for operation in stages[batch][stage]:
            operation.run(states[batch])
    mark("batch", "both")


def execute_operations(
    state: OperationState, steps: Iterable[Step], mark: Callable[[str, str], None]
) -> None:
    """Run one batch through ``steps`` in order; ``mark(kind, name)`` is told each yield."""
    for step in steps:
        if isinstance(step, YieldOperation):
            mark("yield", "")
        else:
            step.run(state)
