"""Where operations go: recorded, or executed, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from runner.schedule import Capture, Op

R = TypeVar("R")


class OpSink(Protocol):
    """Receives every operation of a rank in order."""

    def run(self, op: Op, action: Callable[[], R]) -> R:
        """Note ``op`` and do its work, ``action``."""

    def capture(self, name: str, forward: Callable[[], object]) -> None:
        """Note a graph capture of ``forward``, which announces its operations to this sink."""


class ScheduleRecorder:
    """A sink that keeps the operations: one rank's part of a Schedule.

    Equal operations are one object, so readers of many can tell them apart by identity.
    """

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self._known: dict[Op, Op] = {}

    def run(self, op: Op, action: Callable[[], R]) -> R:
        self.ops.append(self._known.setdefault(op, op))
        return action()

    def capture(self, name: str, forward: Callable[[], object]) -> None:
        """Note the capture, with the number of operations that ``forward`` announces."""
        before, self.ops = self.ops, []
        forward()
        before.append(Capture(name, len(self.ops)))
        self.ops = before
