"""When collectives that were begun really ran, by the host's clock or by the GPU's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from launch.comm import UnderWay
from launch.comm_stream import Ran

Times = Callable[[], tuple[float, float]]
"""Start and end in seconds since the epoch; only asked for once the device is idle."""


class Stream(Protocol):
    """Tells when collectives that were begun really ran."""

    def begun(self, handle: Any) -> Any:
        """A collective was just begun; what this returns goes to :meth:`awaited`."""

    def awaited(self, begun: Any) -> Times:
        """It was awaited just now."""


class HostStream:
    """Takes the host's calls for what happened."""

    def begun(self, handle: Any) -> float:
        """See the protocol."""
        return time.time()

    def awaited(self, begun: float) -> Times:
        """See the protocol."""
        end = time.time()
        return lambda: (begun, end)


class DeviceStream:
    """Asks the GPU's events."""

    def __init__(self, device: torch.device) -> None:
        self._clock = DeviceClock(device)

    def begun(self, handle: UnderWay) -> Ran:
        """See the protocol."""
        assert isinstance(handle.work, Ran)
        return handle.work

    def awaited(self, begun: Ran) -> Times:
        """See the protocol."""
        return lambda: (self._clock.seconds(begun.start), self._clock.seconds(begun.end))


class DeviceClock:
    """Turns events of a GPU into seconds since the epoch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._origin: tuple[float, torch.cuda.Event] | None = None

    def seconds(self, event: torch.cuda.Event) -> float:
        """When an event was, which must be over."""
        if self._origin is None:
            self._origin = self._now()
        at, origin = self._origin
        # Negative where the event was before the origin.
        return at + float(origin.elapsed_time(event)) / 1e3

    def _now(self) -> tuple[float, torch.cuda.Event]:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        event.synchronize()
        return time.time(), event
