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
    """What a rank asks of its device besides math. On a CPU there is never anything to wait for."""

    def __init__(self, device: torch.device, link: str) -> None:
        self._device, self._link = device, link
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._origin: tuple[float, torch.cuda.Event] | None = None

    def synchronise(self) -> None:
        """Wait only for the current stream: a send to a late stage must not hold this rank up."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def wait_for_communication(self) -> None:
        """Wait until communication is done: NCCL's calls only queue it."""
        if self._link == "nccl":
            wait_for_device(self._device)

    def times(self, events: CollectiveEvents) -> tuple[float, float]:
        """When a finished collective started and ended, in seconds since the epoch."""
        if self._origin is None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            event.synchronize()
            self._origin = time.time(), event
        at, origin = self._origin
        # elapsed_time is in milliseconds, and negative for events before the origin.
        start, end = (float(origin.elapsed_time(each)) for each in (events.start, events.end))
        return at + start / 1e3, at + end / 1e3

    def capture(self, forward: Callable[[], object]) -> None:
        """Capture ``forward`` as a CUDA graph and keep it, as servers do; a CPU just runs it."""
        if self._device.type == "cuda":
            self._graphs.append(capture_graph(self._device, forward))
        else:
            forward()

    def release_graphs(self) -> None:
        """Release all graphs, which must happen before the communicator that they use ends."""
        self._graphs.clear()


def wait_for_device(device: torch.device) -> None:
    """Wait until a GPU's current stream is empty; the CPU core is free for others meanwhile."""
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    while not done.query():
        time.sleep(_POLL_SECONDS)


def capture_graph(device: torch.device, forward: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture ``forward`` as a CUDA graph.

    Raises:
        UserError: the forward does something that a CUDA graph does not allow.
        torch.OutOfMemoryError: the graph does not fit in the GPU's memory.
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
    """Events of a queued collective: ``start`` and ``end`` time it, others wait for ``done``."""

    start: torch.cuda.Event
    end: torch.cuda.Event
    done: torch.cuda.Event

    def is_completed(self) -> bool:
        """Whether the collective has ended; named as in :class:`torch.distributed.Work`."""
        return bool(self.done.query())


class CollectiveStream:
    """Runs collectives one after the other, while the current stream goes on.

    NCCL runs collectives in the order in which they were queued, from whatever stream. Having them
    all on one stream makes that order explicit, and lets events show when each collective ran.

    Attributes:
        noted: the events of all collectives since this was set to a list; None keeps none. Each
            replay of a graph records its events anew.
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
        """Make the current stream wait for a collective; the host does not wait."""
        torch.cuda.current_stream(self._device).wait_event(events.done)


def replayed_event() -> torch.cuda.Event:
    """A timing event that each replay of a CUDA graph records anew."""
    return torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
