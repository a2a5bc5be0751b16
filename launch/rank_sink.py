"""The sink of a real run: keeps the operations, makes kernels ready, and notes what took time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from runner.backend.sink import R
from runner.jit.kernel_type import KernelCall
from runner.jit.kernels import Kernel, kernels_of
from runner.jit.lazy import LazyJit
from runner.jit.shim import CompileRecord
from runner.schedule import Collective, KernelWork, Mark, Op, Recv, Send
from runner.timeline import Span


class KernelLoader(Protocol):
    """Makes kernels ready before a call; tells whether the call is a first use."""

    def prepare(self, kernels: Sequence[Kernel]) -> bool:
        """Load or compile what is not in memory; True where there was any."""

    def load(self, kernels: Sequence[Kernel]) -> None:
        """Bring kernels that are on disk into memory."""


class OwnJit:
    """Our own lazy JIT, for machines without a GPU; without a compiler it only keeps track."""

    def __init__(self, jit: LazyJit | None) -> None:
        self._jit = jit

    def prepare(self, kernels: Sequence[Kernel]) -> bool:
        """See the protocol."""
        if self._jit is None:
            return False
        new = [kernel for kernel in kernels if not self._jit.is_loaded(kernel)]
        for kernel in new:
            self._jit.ensure(kernel)
        return bool(new)

    def load(self, kernels: Sequence[Kernel]) -> None:
        """See the protocol."""
        self.prepare(kernels)


class LibraryJit:
    """The library's own JIT: it loads or compiles inside the call; we only know which are new.

    ``call_each`` makes the library load kernels by calling each once; it returns those it called.
    """

    def __init__(self, call_each: Callable[[Sequence[Kernel]], Sequence[Kernel]]) -> None:
        self._seen: set[Kernel] = set()
        self._call_each = call_each

    def prepare(self, kernels: Sequence[Kernel]) -> bool:
        """See the protocol."""
        new = set(kernels) - self._seen
        self._seen |= new
        return bool(new)

    def load(self, kernels: Sequence[Kernel]) -> None:
        """See the protocol."""
        self._seen.update(
            self._call_each([kernel for kernel in kernels if kernel not in self._seen])
        )


class RankSink:
    """One rank's operations and spans.

    A first use of a kernel is one ``load`` span, out of which :func:`cut_compiles` later cuts the
    compiles that the compiler shim saw.
    """

    def __init__(
        self,
        rank: int,
        loader: KernelLoader,
        *,
        synchronise: Callable[[], None],
        inside: bool,
        on_forward: Callable[[str, str], None] = lambda phase, name: None,
    ) -> None:
        """Make a sink.

        Args:
            rank: world rank.
            loader: makes kernels ready.
            synchronise: waits until the device is idle.
            inside: whether loading happens inside the call (the library) or before it (ours).
            on_forward: told (phase, mode and tokens) at the start of each forward.
        """
        self.rank = rank
        self.ops: list[Op] = []
        self.spans: list[Span] = []
        self.last = "start"
        self._loader, self._synchronise, self._inside = loader, synchronise, inside
        self._on_forward = on_forward
        self._sequence: Counter[str] = Counter()
        self._phase: tuple[str, float] | None = None

    def run(self, op: Op, action: Callable[[], R]) -> R:
        """Note ``op``, do it, and note the time it took."""
        self.ops.append(op)
        if isinstance(op, Mark):
            self._mark(op)
            return action()
        self.last = op.describe() if isinstance(op, KernelCall) else op.name
        if isinstance(op, KernelCall):
            return self._kernel(op, action)
        if isinstance(op, Collective | Send | Recv):
            # What the device still does is compute, not communication.
            self._timed("compute", "device", self._synchronise)
            return self._timed("comm", _comm_name(op), self._to_the_end(action), self._comm_key(op))
        if isinstance(op, KernelWork):
            # What a build spends its time on, the builder notes kernel by kernel.
            return action() if op.action == "build" else self._timed("load", op.name, action)
        return self._timed("compute", op.name, action)

    def _to_the_end(self, action: Callable[[], R]) -> Callable[[], R]:
        """NCCL returns when a collective is queued; its time is until it is done."""

        def act() -> R:
            result = action()
            self._synchronise()
            return result

        return act

    def _kernel(self, call: KernelCall, action: Callable[[], R]) -> R:
        start = time.time()
        first_use = self._loader.prepare(kernels_of(call))
        name = call.type.name.lower()
        if first_use and self._inside:
            return self._timed("load", name, action)
        if first_use:
            self.spans.append(Span(self.rank, start, time.time(), "load", name))
        return self._timed("compute", name, action)

    def _mark(self, mark: Mark) -> None:
        if mark.kind == "forward" and self._phase is not None:
            self._on_forward(self._phase[0], mark.name)
        if mark.kind != "phase":
            return
        self._timed("compute", "device", self._synchronise)
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

    def _comm_key(self, op: Collective | Send | Recv) -> str:
        if isinstance(op, Collective):
            where = ",".join(map(str, op.group))
        elif isinstance(op, Send):
            where = f"{self.rank}>{op.peer}"
        else:
            where = f"{op.peer}>{self.rank}"
        self._sequence[where] += 1
        return f"{where} #{self._sequence[where]}"


def _comm_name(op: Collective | Send | Recv) -> str:
    prefix = {Collective: "", Send: "send ", Recv: "recv "}[type(op)]
    return f"{prefix}{op.name}"


def cut_compiles(
    spans: Sequence[Span], records: Sequence[CompileRecord], key_of: Callable[[CompileRecord], str]
) -> list[Span]:
    """Put one rank's compiles, as the shim saw them, in place of that part of its load spans."""
    result = [span for span in spans if span.kind != "load"]
    for record in records:
        rank = record.rank
        result.append(
            Span(rank, record.start, record.end, "compile", record.kernel_name, key_of(record))
        )
    for span in spans:
        if span.kind == "load":
            result += _without(span, records)
    return sorted(result, key=lambda span: (span.start, -span.end))


def _without(span: Span, records: Sequence[CompileRecord]) -> list[Span]:
    """What is left of a span outside of compiles."""
    left = []
    at = span.start
    for record in records:
        if record.end <= span.start or record.start >= span.end:
            continue
        if record.start > at:
            left.append(Span(span.rank, at, record.start, "load", span.name))
        at = max(at, record.end)
    if at < span.end:
        left.append(Span(span.rank, at, span.end, "load", span.name))
    return left
