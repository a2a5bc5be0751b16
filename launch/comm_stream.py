"""A GPU's stream for collectives, and when each of them really ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ran:
    """A collective on the stream: events that time its start and end, and one to wait for."""

    start: torch.cuda.Event
    end: torch.cuda.Event
    done: torch.cuda.Event


class CommStream:
    """Runs collectives one after the other, beside what the current stream does.

    A communicator works off what is queued to it in order, on whatever streams that is; with all
    of it on one stream that order is plain to see, and events tell when it ran.

    Args:
        device: the GPU.
        told: is told every collective that was queued, in order.
        timed: makes an event that tells the time.
    """

    def __init__(
        self,
        device: torch.device,
        told: Callable[[Ran], None] = lambda ran: None,
        timed: Callable[[], torch.cuda.Event] = lambda: torch.cuda.Event(enable_timing=True),
    ) -> None:
        self._device, self._told, self._timed = device, told, timed
        self._stream = torch.cuda.Stream(device)

    def start(self, collective: Callable[[], object]) -> Ran:
        """Queue a collective behind what the current stream was given before."""
        ran = Ran(self._timed(), self._timed(), torch.cuda.Event())
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            ran.start.record()
            collective()
            ran.end.record()
            ran.done.record()
        self._told(ran)
        return ran

    def wait(self, ran: Ran) -> None:
        """Let the current stream wait for a collective."""
        torch.cuda.current_stream(self._device).wait_event(ran.done)


def event_of_graph() -> torch.cuda.Event:
    """An event that tells the time each time that the graph that holds it runs."""
    return torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
