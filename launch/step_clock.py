"""When each operation of a forward ended, by a GPU's events or by the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from launch.comm_stream import Ran, event_of_graph
from runner.backend.sink import R
from runner.schedule import Await, Begin, Collective, Mark, Op

Interval = tuple[float, float]


class StepClock(Protocol):
    """Notes points of a forward."""

    def restart(self) -> None:
        """Forget all points; the next one is the first."""

    def note(self) -> None:
        """What was given to this rank up to now ends here."""

    def ends(self) -> list[float]:
        """Seconds of all points since the first one."""


class HostClock:
    """The host's clock, for a CPU, which does what it is given at once."""

    def __init__(self) -> None:
        self._points: list[float] = []

    def restart(self) -> None:
        """See the protocol."""
        self._points.clear()

    def note(self) -> None:
        """See the protocol."""
        self._points.append(time.perf_counter())

    def ends(self) -> list[float]:
        """See the protocol."""
        return [point - self._points[0] for point in self._points]


class GpuClock:
    """Events on the current stream, which a graph holds too."""

    def __init__(self) -> None:
        self._points: list[torch.cuda.Event] = []

    def restart(self) -> None:
        """See the protocol."""
        self._points.clear()

    def note(self) -> None:
        """See the protocol."""
        event = event_of_graph()
        event.record()
        self._points.append(event)

    def ends(self) -> list[float]:
        """See the protocol."""
        return [self.seconds(point) for point in self._points]

    def seconds(self, event: torch.cuda.Event) -> float:
        """Seconds of an event since the first point."""
        return float(self._points[0].elapsed_time(event)) / 1e3


class StepSink:
    """Runs operations, and notes where each ends, unless nobody listens.

    Attributes:
        last: the operation at hand, for whoever wants to know where a rank stands.
        count: operations since it listens.
    """

    def __init__(self) -> None:
        self.last = "start"
        self._clock: StepClock | None = None
        self._ran: list[Ran] = []
        self._begun: dict[str, int] = {}
        self._intervals: list[list[int]] = []
        self.count = 0

    def listen(self, clock: StepClock | None) -> None:
        """Note points on a clock from here on; None is on none."""
        self._clock, self.count = clock, 0
        self._ran, self._intervals, self._begun = [], [], {}
        if clock is not None:
            clock.restart()
            clock.note()

    def event(self) -> torch.cuda.Event:
        """An event for a collective; one that nobody asks needs to tell nothing."""
        return event_of_graph() if self._clock is not None else torch.cuda.Event()

    def ran(self, ran: Ran) -> None:
        """A collective was queued on the GPU's stream."""
        if self._clock is not None:
            self._ran.append(ran)

    def run(self, op: Op, action: Callable[[], R]) -> R:
        """See :class:`runner.backend.sink.OpSink`."""
        if isinstance(op, Mark):
            return action()
        self.last = op.name if hasattr(op, "name") else str(op)
        if isinstance(op, Begin | Collective):
            self._begun[op.name] = len(self._intervals)
            self._intervals.append([self.count, self.count + 1])
        elif isinstance(op, Await):
            self._intervals[self._begun.pop(op.name)][1] = self.count + 1
        result = action()
        self.count += 1
        if self._clock is not None:
            self._clock.note()
        return result

    def capture(self, name: str, forward: Callable[[], object]) -> None:
        """No graphs within a step."""
        raise NotImplementedError(f"{name} within a step")

    def link(self, ends: list[float]) -> list[Interval]:
        """Start and end of every collective, in the order in which they were begun.

        On a CPU a collective that was begun may have ended before it was awaited; nobody tells.
        """
        if isinstance(self._clock, GpuClock):
            return [(self._clock.seconds(r.start), self._clock.seconds(r.end)) for r in self._ran]
        return [(ends[first], ends[last]) for first, last in self._intervals]
