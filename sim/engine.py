"""The event engine: every rank's operations in virtual time.

A rank runs ahead through what concerns only itself and stops where it meets others: at a kernel
that is not in its memory (its node's disk and cores), at a collective, at a receive. Events are
taken in order of time; at one time compiles end before anything starts, then the order of
planning decides. Whoever misses a kernel while another still compiles it compiles it too, as the
library does.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from runner.jit.kernel_type import KernelCall
from runner.jit.kernels import Kernel, kernels_of
from runner.schedule import (
    EXCHANGE,
    Collective,
    Compute,
    KernelWork,
    Mark,
    Op,
    Recv,
    Schedule,
    Send,
)
from runner.timeline import Span
from sim.cores import Cores
from sim.costs import CostModel


@dataclass(frozen=True)
class CollectiveTimeout:
    """A wait beyond the limit: the run would have died at ``time``.

    Attributes:
        time: seconds since the origin.
        rank: the rank that gave up waiting.
        operation: what it waited in.
        waiting_for: the rank that arrived last, or not in time.
        busy_with: what that rank was doing at ``time``.
        needed: the smallest limit that the whole run would have survived, in seconds: its longest
            wait, which need not be this one.
    """

    time: float
    rank: int
    operation: str
    waiting_for: int
    busy_with: str
    needed: float


@dataclass(frozen=True)
class Outcome:
    """Result of a simulation.

    Attributes:
        spans: raw spans (see :func:`runner.timeline.merge`).
        timeout: the wait that would have ended the run, if any.
        disks: kernels that each node's disk holds in the end.
    """

    spans: list[Span]
    timeout: CollectiveTimeout | None
    disks: dict[int, frozenset[Kernel]] = field(default_factory=dict)


class SimulationError(Exception):
    """The schedule cannot run to its end: ranks wait for something that never comes."""


@dataclass
class _Rank:
    index: int
    ops: Sequence[Op]
    node: int
    at: int = 0
    clock: float = 0.0
    loaded: set[Kernel] = field(default_factory=set)
    spans: list[Span] = field(default_factory=list)
    computing_since: float | None = None
    sequence: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    phase: tuple[str, float] | None = None
    waiting_in: str = ""
    done: bool = False

    def close_compute(self) -> None:
        if self.computing_since is not None and self.clock > self.computing_since:
            self.spans.append(
                Span(self.index, self.computing_since, self.clock, "compute", "compute")
            )
        self.computing_since = None


class Engine:
    """Replays a Schedule.

    Args:
        schedule: what every rank does.
        costs: how long it takes.
        node_of: node of each rank; ranks of a node share its disk cache and cores.
        cores_per_node: cores that compiles share.
        timeout: longest wait of a rank in a collective or receive, in seconds; None is no limit.
        cached: kernels that every node's disk holds from the start.
    """

    def __init__(
        self,
        schedule: Schedule,
        costs: CostModel,
        *,
        node_of: Sequence[int],
        cores_per_node: int,
        timeout: float | None = None,
        cached: frozenset[Kernel] = frozenset(),
    ) -> None:
        self._costs, self._timeout = costs, timeout
        self._ranks = [
            _Rank(index, ops, node_of[index]) for index, ops in enumerate(schedule.ranks)
        ]
        nodes = set(node_of)
        self._disk: dict[int, set[Kernel]] = {node: set(cached) for node in nodes}
        self._cores = {node: Cores(cores_per_node) for node in nodes}
        self._cores_per_node = cores_per_node
        self._events: list[tuple[float, int, int, Callable[[float], None]]] = []
        self._tie = count()
        self._arrivals: dict[str, dict[int, float]] = {}
        self._sent: dict[str, tuple[float, float]] = {}
        self._receivers: dict[str, _Rank] = {}
        self._timeouts: list[CollectiveTimeout] = []

    def run(self) -> Outcome:
        """Run to the end.

        Raises:
            SimulationError: some ranks wait for ever.
        """
        for rank in self._ranks:
            self._advance(rank)
        while self._events:
            time, _, _, action = heapq.heappop(self._events)
            action(time)
        stuck = [rank for rank in self._ranks if not rank.done]
        if stuck:
            where = ", ".join(f"rank {rank.index} in {rank.waiting_in}" for rank in stuck[:4])
            raise SimulationError(f"{len(stuck)} ranks wait for ever: {where}")
        spans = [span for rank in self._ranks for span in rank.spans]
        disks = {node: frozenset(disk) for node, disk in self._disk.items()}
        return Outcome(spans, self._first_timeout(spans), disks)

    def _first_timeout(self, spans: list[Span]) -> CollectiveTimeout | None:
        """The time-out that ends the run, with what the whole run would have needed."""
        if not self._timeouts:
            return None
        first = min(self._timeouts, key=lambda timeout: timeout.time)
        needed = max(timeout.needed for timeout in self._timeouts)
        return _with_busy(replace(first, needed=needed), spans)

    def _at(self, time: float, action: Callable[[float], None], priority: int = 1) -> None:
        heapq.heappush(self._events, (time, priority, next(self._tie), action))

    def _advance(self, rank: _Rank) -> None:
        """Run a rank until it meets others or ends."""
        while rank.at < len(rank.ops):
            op = rank.ops[rank.at]
            if isinstance(op, Compute):
                self._compute(rank, self._costs.compute_seconds(op))
            elif isinstance(op, KernelCall):
                missing = [k for k in kernels_of(op) if k not in rank.loaded]
                if missing:
                    rank.close_compute()
                    self._at(rank.clock, self._lookup(rank, missing))
                    return
                self._compute(rank, self._costs.kernel_seconds(op))
            elif isinstance(op, KernelWork) and op.action == "load":
                missing = [kernel for kernel in op.kernels if kernel not in rank.loaded]
                if missing:
                    rank.close_compute()
                    self._at(rank.clock, self._lookup(rank, missing))
                    return
            elif isinstance(op, Mark):
                self._mark(rank, op)
            elif isinstance(op, Send):
                self._send(rank, op)
            else:
                rank.close_compute()
                if isinstance(op, Collective):
                    self._collective(rank, op)
                elif isinstance(op, Recv):
                    self._recv(rank, op)
                else:
                    self._kernel_work(rank, op)
                return
            rank.at += 1
        rank.close_compute()
        rank.done = True

    def _compute(self, rank: _Rank, seconds: float) -> None:
        if rank.computing_since is None:
            rank.computing_since = rank.clock
        rank.clock += seconds

    def _mark(self, rank: _Rank, mark: Mark) -> None:
        if mark.kind != "phase":
            return
        rank.close_compute()
        if rank.phase is not None:
            name, start = rank.phase
            rank.spans.append(Span(rank.index, start, rank.clock, "phase", name))
        rank.phase = None if mark.name == "end" else (mark.name, rank.clock)

    # -- kernels --------------------------------------------------------------------------------

    def _lookup(self, rank: _Rank, missing: list[Kernel]) -> Callable[[float], None]:
        """Event: find the first missing kernel on disk or compile it, then the others."""

        def act(time: float) -> None:
            kernel = missing[0]
            if kernel in self._disk[rank.node]:
                self._load(rank, kernel, missing[1:], time)
                return
            seconds = self._costs.compile_seconds(kernel)

            def compiled(end: float) -> None:
                rank.spans.append(
                    Span(rank.index, time, end, "compile", kernel.name, kernel.identity)
                )
                self._disk[rank.node].add(kernel)
                self._load(rank, kernel, missing[1:], end)

            self._cores[rank.node].start(time, seconds, compiled)
            self._plan_end(rank.node)

        return act

    def _kernel_work(self, rank: _Rank, op: KernelWork) -> None:
        """Build or verify; the builder has its node's cores to itself, since all wait for it."""
        start = rank.clock
        disk = self._disk[rank.node]
        if op.action == "verify":
            end = start + sum(map(self._costs.verify_seconds, op.kernels))
            if end > start:
                rank.spans.append(Span(rank.index, start, end, "load", op.name))
            self._resume(rank, end)
            return
        missing = [kernel for kernel in op.kernels if kernel not in disk]
        spans = self._costs.build_spans(missing, self._cores_per_node)
        for kernel, began, ended in spans:
            name, key = (kernel.name, kernel.identity) if kernel else ("front end", "")
            rank.spans.append(Span(rank.index, start + began, start + ended, "compile", name, key))
        disk.update(missing)
        self._resume(rank, start + max((ended for _, _, ended in spans), default=0.0))

    def _plan_end(self, node: int) -> None:
        cores = self._cores[node]
        end, version = cores.next_end(), cores.version
        if end is None:
            return

        def act(time: float) -> None:
            if cores.version == version:
                cores.finish(time)
                self._plan_end(node)

        self._at(end, act, priority=0)

    def _load(self, rank: _Rank, kernel: Kernel, rest: list[Kernel], time: float) -> None:
        rank.loaded.add(kernel)
        rank.clock = time + self._costs.load_seconds(kernel)
        if rank.clock > time:
            rank.spans.append(Span(rank.index, time, rank.clock, "load", kernel.name))
        if rest:
            self._at(rank.clock, self._lookup(rank, rest))
        else:
            self._at(rank.clock, lambda _: self._advance(rank))

    # -- communication --------------------------------------------------------------------------

    def _key(self, rank: _Rank, where: str) -> str:
        rank.sequence[where] += 1
        return f"{where} #{rank.sequence[where]}"

    def _collective(self, rank: _Rank, op: Collective) -> None:
        key = self._key(rank, ",".join(map(str, op.group)))
        arrivals = self._arrivals.setdefault(key, {})
        arrivals[rank.index] = rank.clock
        rank.waiting_in = f"{op.name} of ranks {op.group}"
        if len(arrivals) < len(op.group):
            return
        del self._arrivals[key]
        last = max(arrivals, key=lambda index: arrivals[index])
        end = arrivals[last] + self._costs.collective_seconds(op)
        if op.name == EXCHANGE:
            self._share_disks(op.group)
        for index, arrival in arrivals.items():
            member = self._ranks[index]
            self._check_wait(index, arrival, last, arrivals[last], op.name)
            member.spans.append(Span(index, arrival, end, "comm", op.name, key))
            self._resume(member, end)

    def _share_disks(self, group: Sequence[int]) -> None:
        disks = [self._disk[node] for node in {self._ranks[index].node for index in group}]
        everything = set().union(*disks)
        for disk in disks:
            disk.update(everything)

    def _send(self, rank: _Rank, op: Send) -> None:
        rank.close_compute()
        key = self._key(rank, f"{rank.index}>{op.peer}")
        arrival = rank.clock + self._costs.transfer_seconds(op.bytes)
        self._sent[key] = (rank.clock, arrival)
        rank.spans.append(Span(rank.index, rank.clock, rank.clock, "comm", f"send {op.name}", key))
        if key in self._receivers:
            self._deliver(self._receivers.pop(key), key, op.name, rank.index)

    def _recv(self, rank: _Rank, op: Recv) -> None:
        key = self._key(rank, f"{op.peer}>{rank.index}")
        rank.waiting_in = f"recv {op.name} from rank {op.peer}"
        if key in self._sent:
            self._deliver(rank, key, op.name, op.peer)
        else:
            self._receivers[key] = rank

    def _deliver(self, receiver: _Rank, key: str, name: str, sender: int) -> None:
        sent, arrival = self._sent.pop(key)
        end = max(receiver.clock, arrival)
        self._check_wait(receiver.index, receiver.clock, sender, sent, f"recv {name}")
        receiver.spans.append(
            Span(receiver.index, receiver.clock, end, "comm", f"recv {name}", key)
        )
        self._resume(receiver, end)

    def _resume(self, rank: _Rank, time: float) -> None:
        rank.clock = time
        rank.at += 1
        self._at(time, lambda _: self._advance(rank))

    def _check_wait(
        self, rank: int, arrival: float, last: int, last_arrival: float, name: str
    ) -> None:
        waited = last_arrival - arrival
        if self._timeout is not None and waited > self._timeout:
            self._timeouts.append(
                CollectiveTimeout(arrival + self._timeout, rank, name, last, "", waited)
            )


def _with_busy(timeout: CollectiveTimeout, spans: list[Span]) -> CollectiveTimeout:
    """Say what the awaited rank was doing when the limit passed."""
    doing = [
        f"{span.kind} {span.name}"
        for span in spans
        if span.rank == timeout.waiting_for
        and span.kind != "phase"
        and span.start <= timeout.time < span.end
    ]
    return replace(timeout, busy_with=doing[0] if doing else "nothing")
