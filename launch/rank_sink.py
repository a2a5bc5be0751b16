"""The sink of a real run: keeps the operations, makes kernels ready, and notes what took time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from launch.loaders import KernelLoader
from launch.streams import HostStream, Stream, Times
from launch.wait_limit import NoLimit, WaitLimit
from launch.watchdog import Communication
from runner.backend.sink import R
from runner.kernels.kernel import Kernel
from runner.kernels.table import KernelTable
from runner.kernels.types import GemmShape, KernelCall
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


class RankSink:
    """One rank's operations and spans.

    A first use of a kernel is one ``load`` span, out of which
    :func:`launch.compile_spans.cut_compiles` later cuts the compiles that the shim saw.
    """

    def __init__(
        self,
        rank: int,
        loader: KernelLoader,
        table: KernelTable,
        *,
        synchronise: Callable[[], None],
        inside: bool,
        arrive: Callable[[], None] = lambda: None,
        limit: WaitLimit | None = None,
        lock: Callable[[GemmShape], AbstractContextManager[None]] = lambda shape: nullcontext(),
        capture: Callable[[Callable[[], object]], None] = lambda forward: None,
        on_forward: Callable[[str, str], None] = lambda phase, name: None,
        stream: Stream | None = None,
    ) -> None:
        """Make a sink.

        Args:
            rank: world rank.
            loader: makes kernels ready.
            table: which kernels calls run.
            synchronise: waits until the device is idle.
            inside: whether loading happens inside the call (the library) or before it (ours).
            arrive: waits until communication that was begun is done.
            limit: ends communications that take too long; None ends none.
            lock: held while a GEMM's kernels are brought in for the first time.
            capture: captures a CUDA graph of a forward.
            on_forward: told (phase, mode and tokens) at the start of each forward.
            stream: tells when what was begun ran; by default from the host's calls.
        """
        self.rank = rank
        self.ops: list[Op] = []
        self.spans: list[Span] = []
        self.forwards: list[tuple[float, str, str]] = []
        self.last = "start"
        self._loader, self._table, self._inside = loader, table, inside
        self._synchronise = synchronise
        self._arrive, self._limit = arrive, limit or NoLimit()
        self._lock, self._capture, self._on_forward = lock, capture, on_forward
        self._stream = stream or HostStream()
        self._begun: dict[str, tuple[Begin, Any]] = {}
        self._ran: list[tuple[str, Times]] = []
        self._capturing = False
        self._keys = MessageKeys(rank)
        self._phase: tuple[str, float] | None = None

    def run(self, op: Op, action: Callable[[], R]) -> R:
        """Note ``op``, do it, and note the time it took."""
        self.ops.append(op)
        if self._capturing:
            return action()
        if isinstance(op, Mark):
            self._mark(op)
            return action()
        self.last = op.describe() if isinstance(op, KernelCall) else op.name
        return self._done(op, action)

    def _done(self, op: Op, action: Callable[[], R]) -> R:
        if isinstance(op, KernelCall):
            return self._kernel(op, action)
        if isinstance(op, Collective | Send | Recv):
            return self._communicate(op, action)
        if isinstance(op, Begin | Await):
            return self._beside(op, action)
        if isinstance(op, KernelWork | Walk):
            return self._work_on_kernels(op, action)
        return self._timed("compute", op.name, action)

    def _communicate(self, op: Collective | Send | Recv, action: Callable[[], R]) -> R:
        # What the device still does is compute, not communication.
        self._timed("compute", "device", self._synchronise)
        done = self._to_the_end(op, action)
        return self._timed("comm", message_name(op), done, self._keys.next_key(op))

    def _beside(self, op: Begin | Await, action: Callable[[], R]) -> R:
        """What is begun goes on beside what follows; how long is known once it was awaited."""
        if isinstance(op, Begin):
            result = self._timed("compute", op.name, self._limited(op, action))
            self._limit.begun(op, result)
            self._begun[op.name] = op, self._stream.begun(result)
            return result
        begun, handle = self._begun.pop(op.name)
        result = self._timed("wait", op.name, self._limited(begun, action))
        self._ran.append((op.name, self._stream.awaited(handle)))
        return result

    def _note_beside(self) -> None:
        """Note what went on beside, once the device is idle and can tell."""
        for name, times in self._ran:
            start, end = times()
            self.spans.append(Span(self.rank, start, max(start, end), "beside", name))
        self._ran.clear()

    def _work_on_kernels(self, op: KernelWork | Walk, action: Callable[[], R]) -> R:
        if isinstance(op, Walk):
            with self._lock(op.shape):
                return self._timed("load", op.name, action)
        # What a build spends its time on, the builder notes kernel by kernel.
        return action() if op.action == "build" else self._timed("load", op.name, action)

    def _to_the_end(self, op: Collective | Send | Recv, action: Callable[[], R]) -> Callable[[], R]:
        """NCCL returns when a collective is queued; its time is until it is done."""

        def act() -> R:
            result = action()
            self._arrive()
            return result

        return self._limited(op, act)

    def _limited(self, op: Communication, action: Callable[[], R]) -> Callable[[], R]:
        def act() -> R:
            with self._limit.over(op):
                return action()

        return act

    def capture(self, name: str, forward: Callable[[], object]) -> None:
        """Capture a graph of ``forward``; its operations are counted and nothing of it timed."""
        before, self.ops = self.ops, []
        start = time.time()
        self._capturing = True
        try:
            self._synchronise()
            with self._limit.quiet():
                self._capture(forward)
        finally:
            self._capturing = False
            before.append(Capture(name, len(self.ops)))
            self.ops = before
        self.spans.append(Span(self.rank, start, time.time(), "compute", name))

    def _kernel(self, call: KernelCall, action: Callable[[], R]) -> R:
        kernels = self._table.kernels_of(call)
        if not self._loader.lacks(kernels):
            return self._timed("compute", call.type.name.lower(), action)
        shape = GemmShape(call.type, call.n, call.k, call.num_groups, call.num_sms)
        since = time.time()
        with self._lock(shape):
            return self._first_use(call, kernels, action, since)

    def _first_use(
        self, call: KernelCall, kernels: Sequence[Kernel], action: Callable[[], R], since: float
    ) -> R:
        start = time.time()
        if start - since > _SHOWN_WAIT:
            self.spans.append(Span(self.rank, since, start, "wait", "compile lock"))
        self._loader.prepare(kernels)
        name = call.type.name.lower()
        if self._inside:
            return self._timed("load", name, action)
        self.spans.append(Span(self.rank, start, time.time(), "load", name))
        return self._timed("compute", name, action)

    def _mark(self, mark: Mark) -> None:
        if mark.kind == "forward" and self._phase is not None:
            self.forwards.append((time.time(), self._phase[0], mark.name))
            self._on_forward(self._phase[0], mark.name)
        if mark.kind != "phase":
            return
        self._timed("compute", "device", self._synchronise)
        self._note_beside()
        now = time.time()
        if self._phase is not None:
            name, start = self._phase
            self.spans.append(Span(self.rank, start, now, "phase", name))
        self._phase = None if mark.name == "end" else (mark.name, now)

    def _timed(self, kind: str, name: str, action: Callable[[], R], key: str = "") -> R:
        start = time.time()
        result = action()
        self.spans.append(Span(self.rank, start, time.time(), kind, name, key))
        return result


_SHOWN_WAIT = 1e-3
