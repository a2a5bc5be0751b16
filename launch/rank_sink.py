"""The sink of a real run: records operations, makes their kernels ready, and times them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from launch.comm import AsyncCollective
from launch.device import CollectiveEvents, Device
from launch.limits import WaitLimit
from launch.loaders import CompileLocks, KernelLoader
from runner.backend.step_runner import R
from runner.kernels.kernel import body_of, identity_of
from runner.kernels.types import GemmShape, KernelCall
from runner.planning.residency import SERVING
from runner.schedule import (
    Await,
    Begin,
    Capture,
    Collective,
    KernelWork,
    Mark,
    MessageKeys,
    Op,
    Recv,
    Send,
    Walk,
    message_name,
)
from runner.timeline import Span
from runner.watch.shim import CompileRecord

_SHOWN_WAIT_SECONDS = 1e-3


class RankSink:
    """One rank's operations, and its spans in seconds since the epoch.

    The first use of a kernel is one ``load`` span; :func:`split_loads` later cuts the compiles
    that the shim recorded out of it.

    Attributes:
        served: (start, mode and tokens) of each forward that serves requests after the first.
        last: the operation that is running, or ran last.

    Args:
        locks: held while a GEMM's kernels are loaded for the first time; None means no locks.
        on_forward: called with (phase, mode and tokens) at the start of each forward.
    """

    def __init__(
        self,
        rank: int,
        loader: KernelLoader,
        device: Device,
        limit: WaitLimit,
        *,
        locks: CompileLocks | None = None,
        on_forward: Callable[[str, str], None] | None = None,
    ) -> None:
        self.ops: list[Op] = []
        self.spans: list[Span] = []
        self.served: list[tuple[float, str]] = []
        self.last = "start"
        self._rank, self._loader, self._device = rank, loader, device
        self._limit, self._locks, self._on_forward = limit, locks, on_forward
        self._begun: dict[str, tuple[Begin, float, CollectiveEvents | None]] = {}
        self._awaited: list[tuple[str, float, float, CollectiveEvents | None]] = []
        self._capturing = False
        self._keys = MessageKeys(rank)
        self._phase = "", 0.0

    def run(self, op: Op, action: Callable[[], R]) -> R:
        """Record ``op``, do it, and time it."""
        self.ops.append(op)
        if self._capturing:
            return action()
        if isinstance(op, Mark):
            self._mark(op)
            return action()
        self.last = op.describe() if isinstance(op, KernelCall) else op.name
        return self._timed(op, action)

    def _timed(self, op: Op, action: Callable[[], R]) -> R:
        if isinstance(op, KernelCall):
            return self._kernel(op, action)
        if isinstance(op, Collective | Send | Recv):
            return self._communicate(op, action)
        if isinstance(op, Begin):
            return self._begin(op, action)
        if isinstance(op, Await):
            return self._await(op, action)
        locked = self._lock(op.shape) if isinstance(op, Walk) else nullcontext()
        kind = "load" if isinstance(op, Walk | KernelWork) else "compute"
        # The builder gives each kernel its own span.
        building = isinstance(op, KernelWork) and op.action == "build"
        with locked, nullcontext() if building else self._span(kind, op.name):
            return action()

    def capture(self, name: str, forward: Callable[[], object]) -> None:
        """Capture a CUDA graph of ``forward``; its operations are counted but not timed."""
        before = len(self.ops)
        self._capturing = True
        try:
            with self._span("compute", name):
                self._device.synchronise()
                with self._limit.quiet:
                    self._device.capture(forward)
        finally:
            self._capturing = False
            self.ops[before:] = [Capture(name, len(self.ops) - before)]

    def _kernel(self, call: KernelCall, action: Callable[[], R]) -> R:
        name = call.type.name.lower()
        if self._loader.is_ready(call):
            with self._span("compute", name):
                return action()
        asked = time.time()
        with self._lock(call.shape):
            start = time.time()
            if start - asked > _SHOWN_WAIT_SECONDS:
                self._add("wait", "compile lock", asked, start)
            if self._loader.loads_inside_calls:
                self._loader.prepare(call)
                with self._span("load", name):
                    return action()
            with self._span("load", name):
                self._loader.prepare(call)
            with self._span("compute", name):
                return action()

    def _communicate(self, op: Collective | Send | Recv, action: Callable[[], R]) -> R:
        # The work still queued on the device is compute, not communication.
        with self._span("compute", "device"):
            self._device.synchronise()
        with (
            self._span("comm", message_name(op), self._keys.next_key(op)),
            self._limit.over(op),
        ):
            result = action()
            self._device.wait_for_communication()
            return result

    def _begin(self, op: Begin, action: Callable[[], R]) -> R:
        with self._span("compute", op.name), self._limit.over(op):
            handle = action()
        work = handle.work if isinstance(handle, AsyncCollective) else None
        if work is not None:
            self._limit.started(op, work.is_completed)
        events = work if isinstance(work, CollectiveEvents) else None
        self._begun[op.name] = op, time.time(), events
        return handle

    def _await(self, op: Await, action: Callable[[], R]) -> R:
        begun, start, events = self._begun.pop(op.name)
        with self._span("wait", op.name), self._limit.over(begun):
            result = action()
        self._awaited.append((op.name, start, time.time(), events))
        return result

    def _add_asynchronous_collectives(self) -> None:
        """Add spans of awaited collectives, whose times are known once the device is idle."""
        for name, begun, awaited, events in self._awaited:
            start, end = self._device.times(events) if events else (begun, awaited)
            self._add("beside", name, start, max(start, end))
        self._awaited.clear()

    def _mark(self, mark: Mark) -> None:
        phase, start = self._phase
        if mark.kind == "forward":
            if phase == SERVING:
                self.served.append((time.time(), mark.name))
            if self._on_forward is not None:
                self._on_forward(phase, mark.name)
        if mark.kind != "phase":
            return
        with self._span("compute", "device"):
            self._device.synchronise()
        self._add_asynchronous_collectives()
        now = time.time()
        if phase:
            self._add("phase", phase, start, now)
        self._phase = ("" if mark.name == "end" else mark.name), now

    def _lock(self, shape: GemmShape) -> AbstractContextManager[None]:
        return nullcontext() if self._locks is None else self._locks.held(shape)

    @contextmanager
    def _span(self, kind: str, name: str, key: str = "") -> Iterator[None]:
        """Time the block; if it raises, there is no span."""
        start = time.time()
        yield
        self._add(kind, name, start, time.time(), key)

    def _add(self, kind: str, name: str, start: float, end: float, key: str = "") -> None:
        self.spans.append(Span(self._rank, start, end, kind, name, key))


def split_loads(spans: Sequence[Span], compiles: Sequence[CompileRecord]) -> list[Span]:
    """Cut the compiles that the shim recorded out of one rank's ``load`` spans."""
    result = []
    for c in compiles:
        identity = identity_of(c.kernel_name, body_of(c.source))
        result.append(Span(c.rank, c.start, c.end, "compile", c.kernel_name, identity))
    for span in spans:
        if span.kind != "load":
            result.append(span)
            continue
        at = span.start
        for record in compiles:
            if record.end <= span.start or record.start >= span.end:
                continue
            if record.start > at:
                result.append(Span(span.rank, at, record.start, "load", span.name))
            at = max(at, record.end)
        if at < span.end:
            result.append(Span(span.rank, at, span.end, "load", span.name))
    return sorted(result, key=lambda span: (span.start, -span.end))
