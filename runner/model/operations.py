"""A layer's forward as a list of named operations with yield marks, and its plain execution.

Names and order follow SGLang's two-batch-overlap operations. Marks cut the list into stages; the
plain execution here runs one batch and only records the marks. An overlapped executor runs two
half batches over the same lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def execute_operations(
    state: OperationState, steps: Iterable[Step], mark: Callable[[str, str], None]
) -> None:
    """Run one batch through ``steps`` in order; ``mark(kind, name)`` is told each yield."""
    for step in steps:
        if isinstance(step, YieldOperation):
            mark("yield", "")
        else:
            step.run(state)
