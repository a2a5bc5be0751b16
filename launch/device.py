"""A rank's device: waiting for it, its clock, its stream for collectives, and CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from runner.errors import UserError

_POLL_SECONDS = 2e-4


class Device:
    """What a rank asks of its device besides math. A CPU has done everything at once."""

    def __init__(self, device: torch.device, link: str) -> None:
        self._device, self._link = device, link
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._origin: tuple[float, torch.cuda.Event] | None = None

    def synchronise(self) -> None:
        """Wait for the current stream alone: a send to a late stage must not hold this rank up."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def wait_for_communication(self) -> None:
        """Wait until communication is done; NCCL only queues it."""
        if self._link == "nccl":
            wait_for_device(self._device)

    def times(self, events: CollectiveEvents) -> tuple[float, float]:
        """Start and end of a finished collective, in seconds since the epoch."""
        if self._origin is None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            event.synchronize()
            self._origin = time.time(), event
        at, origin = self._origin
        # Milliseconds are negative for events before the origin.
        start, end = (float(origin.elapsed_time(each)) for each in (events.start, events.end))
        return at + start / 1e3, at + end / 1e3

    def capture(self, forward: Callable[[], object]) -> None:
        """Capture ``forward`` as a CUDA graph and keep it, as servers do; a CPU runs it again."""
        if self._device.type == "cuda":
            self._graphs.append(capture_graph(self._device, forward))
        else:
            forward()

    def release_graphs(self) -> None:
        """Release all graphs: a communicator that they use cannot end before them."""
        self._graphs.clear()


def wait_for_device(device: torch.device) -> None:
    """Wait until a GPU has done all of its current stream, leaving the core to others meanwhile."""
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    while not done.query():
        time.sleep(_POLL_SECONDS)


def capture_graph(device: torch.device, forward: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture ``forward`` as a CUDA graph.

    Raises:
        UserError: a CUDA graph cannot hold the forward.
        torch.OutOfMemoryError: the GPU's memory cannot hold the graph.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    try:
        with torch.cuda.graph(graph):
            forward()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"this forward cannot be captured as a CUDA graph: {reason}") from error
    torch.cuda.synchronize(device)
    return graph


@dataclass(frozen=True)
class CollectiveEvents:
    """Events of a queued collective: two that time its start and end, and one to wait for."""

    start: torch.cuda.Event
    end: torch.cuda.Event
    done: torch.cuda.Event

    def is_completed(self) -> bool:
        """Whether the collective has ended, as :class:`torch.distributed.Work` says it."""
        return bool(self.done.query())


class CollectiveStream:
    """Runs collectives one after the other, while the current stream goes on.

    NCCL works off its queue in order, on whatever streams it was filled from. With all collectives
    on one stream that order is explicit, and events show when each of them ran.

    Attributes:
        noted: events of all collectives since it was set, renewed by each replay of a graph that
            holds them; None notes none.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self.noted: list[CollectiveEvents] | None = None

    def start(self, collective: Callable[[], object]) -> CollectiveEvents:
        """Queue a collective behind everything on the current stream."""
        plain = partial(torch.cuda.Event, enable_timing=True)
        timer = plain if self.noted is None else replayed_event
        events = CollectiveEvents(timer(), timer(), torch.cuda.Event())
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            events.start.record()
            collective()
            events.end.record()
            events.done.record()
        if self.noted is not None:
            self.noted.append(events)
        return events

    def wait(self, events: CollectiveEvents) -> None:
        """Let the current stream wait for a collective; the host goes on."""
        torch.cuda.current_stream(self._device).wait_event(events.done)


def replayed_event() -> torch.cuda.Event:
    """A timing event that a graph records anew at each replay."""
    return torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
