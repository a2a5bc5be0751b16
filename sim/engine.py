"""The event engine: every rank's operations in virtual time.

A rank has two clocks: its host's and its GPU's. The host runs ahead through what concerns only
itself and stops where it meets others: at a kernel that is not in its memory (its node's disk and
cores), at a lock, and where it waits for its GPU. The GPU works off what the host has queued;
a collective there ends once every member's GPU has come to it. A host waits for its GPU after each
communication, as our driver does, or, where it runs ahead, only for what it receives and at the
end of a forward, as a server over NCCL does.

Events are taken in order of time; at one time compiles end before anything starts, then the order
of planning decides. Whoever misses a kernel while another still compiles it compiles it too, as
the library does, unless first uses are locked.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

from runner.jit.kernels import Kernel
from runner.schedule import (
    EXCHANGE,
    OF_HOSTS,
    Capture,
    Collective,
    KernelWork,
    Mark,
    Recv,
    Send,
)
from runner.stalls import STALLS_AFTER
from runner.timeline import Span
from sim.cores import Cores
from sim.costs import CostModel
from sim.culprit import WORK, CollectiveTimeout, with_culprit
from sim.locks import Locks
from sim.program import FirstUse, Instruction, Run, WalkRun, used_before


@dataclass(frozen=True)
class Outcome:
    """Result of a simulation.

    Attributes:
        spans: raw spans (see :func:`runner.timeline.merge`).
        timeout: the wait that would have ended the run, if any.
        disks: kernels that each node's disk holds in the end.
        longest_wait: seconds of the longest wait of any rank in a communication that ``timeout``
            is for.
        ends: when each rank was done.
        up: kernels on each node's disk when the server is up.
    """

    spans: list[Span]
    timeout: CollectiveTimeout | None
    disks: dict[int, frozenset[Kernel]] = field(default_factory=dict)
    longest_wait: float = 0.0
    ends: tuple[float, ...] = ()
    up: dict[int, frozenset[Kernel]] = field(default_factory=dict)


class SimulationError(Exception):
    """The schedule cannot run to its end: ranks wait for something that never comes."""


@dataclass(slots=True)
class _Queued:
    """Something in a rank's queue for its GPU; ``at`` is the host's time when it was queued."""

    work: Run | Collective | Send | Recv
    at: float
    key: str = ""
    host_waits: bool = False
    arrived: float | None = None
    end: float | None = None


@dataclass
class _Rank:
    index: int
    program: Sequence[Instruction]
    node: int
    clock: float
    device: float
    at: int = 0
    queue: deque[_Queued] = field(default_factory=deque)
    waits_for_device: bool = False
    waiting_in: str = ""
    done: bool = False
    spans: list[Span] = field(default_factory=list)
    computing_since: float | None = None
    communicated: float = 0.0
    sequence: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    phase: tuple[str, float] | None = None

    def close_compute(self) -> None:
        if self.computing_since is not None and self.clock > self.computing_since:
            self.note(self.computing_since, self.clock, "compute", "compute")
        self.computing_since = None

    def wait_for_device(self) -> None:
        """Go on when the GPU is done; what it communicated after the host's work is a wait."""
        if self.communicated > self.clock:
            computed = self.computing_since is not None
            self.close_compute()
            self.note(self.clock, self.communicated, "wait", "GPU")
            self.clock = self.communicated
            self.computing_since = self.communicated if computed else None
        self.clock = max(self.clock, self.device)

    def note(self, start: float, end: float, kind: str, name: str, key: str = "") -> None:
        self.spans.append(Span(self.index, start, end, kind, name, key))

    def next_key(self, where: str) -> str:
        self.sequence[where] += 1
        return f"{where} #{self.sequence[where]}"


class Engine:
    """Replays the programs of all ranks.

    Args:
        programs: what every rank does; see :func:`sim.program.compile_program`.
        costs: how long it takes.
        node_of: node of each rank; ranks of a node share its disk cache and cores.
        cores_per_node: cores that a builder uses; what compiles at a time cost is in ``costs``.
        host_of: machine of each node, where several share one's cores; by default each has its own.
        timeout: longest wait of a rank in a communication, in seconds; None is no limit.
        host_timeout: the same of what hosts do among themselves where they run ahead: receiving
            from another stage, exchanging kernels.
        cached: kernels that every node's disk holds from the start.
        run_ahead: whether hosts queue communication and go on, until a forward's end.
        start: seconds since the origin at which all ranks start.
    """

    def __init__(
        self,
        programs: Sequence[Sequence[Instruction]],
        costs: CostModel,
        *,
        node_of: Sequence[int],
        cores_per_node: int,
        host_of: Sequence[int] | None = None,
        timeout: float | None = None,
        host_timeout: float | None = None,
        cached: frozenset[Kernel] = frozenset(),
        run_ahead: bool = False,
        start: float = 0.0,
    ) -> None:
        self._costs, self._run_ahead = costs, run_ahead
        self._timeout, self._host_timeout = timeout, host_timeout
        self._ranks = [
            _Rank(index, program, node_of[index], start, start)
            for index, program in enumerate(programs)
        ]
        nodes = set(node_of)
        self._disk: dict[int, set[Kernel]] = {node: set(cached) for node in nodes}
        hosts = dict(enumerate(host_of)) if host_of is not None else {node: node for node in nodes}
        pools = {host: Cores(costs.slowdown) for host in hosts.values()}
        self._cores = {node: pools[hosts[node]] for node in nodes}
        self._cores_per_node = cores_per_node
        self._locks = Locks(self._at)
        self._events: list[tuple[float, int, int, Callable[[float], None]]] = []
        self._tie = count()
        self._arrivals: dict[str, list[tuple[_Rank, _Queued]]] = {}
        self._sent: dict[str, tuple[float, float]] = {}
        self._receivers: dict[str, _Rank] = {}
        self._timeouts: list[CollectiveTimeout] = []
        self._longest_waits = {False: 0.0, True: 0.0}
        self._communication: list[Span] = []
        self._cached = cached
        self._exchanged: set[int] = set()

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
        ends = tuple(rank.clock for rank in self._ranks)
        lost = self._first_timeout(spans)
        return Outcome(spans, lost, disks, self._longest_waits[False], ends, self._up())

    def _up(self) -> dict[int, frozenset[Kernel]]:
        """What each node has once its ranks have done what comes before further requests."""
        held = {node: set(self._cached) for node in self._disk}
        for rank in self._ranks:
            held[rank.node].update(used_before(rank.program, STALLS_AFTER))
        if self._exchanged:
            everything = set().union(*(held[node] for node in self._exchanged))
            for node in self._exchanged:
                held[node] |= everything
        return {node: frozenset(kernels) for node, kernels in held.items()}

    def _at(self, time: float, action: Callable[[float], None], priority: int = 1) -> None:
        heapq.heappush(self._events, (time, priority, next(self._tie), action))

    # -- a rank's host --------------------------------------------------------------------------

    def _advance(self, rank: _Rank) -> None:
        """Run a rank's host until it meets others or ends."""
        while rank.at < len(rank.program):
            if not self._step(rank, rank.program[rank.at]):
                return
        if self._synchronised(rank):
            rank.close_compute()
            rank.done = True

    def _go_on(self, rank: _Rank, _: float) -> None:
        self._advance(rank)

    def _step(self, rank: _Rank, item: Instruction) -> bool:
        """Do an instruction; False where the host has to wait in or before it."""
        if isinstance(item, Run):
            self._compute(rank, item)
        elif isinstance(item, Collective | Send | Recv):
            return self._communicate(rank, item)
        elif isinstance(item, Mark):
            if (item.kind == "phase" or self._run_ahead) and not self._synchronised(rank):
                return False
            self._mark(rank, item)
        elif isinstance(item, Capture):
            self._compute(rank, Run(self._costs.capture_seconds(item), 0.0))
        else:
            return self._kernels(rank, item)
        rank.at += 1
        return True

    def _compute(self, rank: _Rank, work: Run) -> None:
        if rank.computing_since is None:
            rank.computing_since = rank.clock
        rank.clock += work.host
        if rank.queue:
            rank.queue.append(_Queued(work, rank.clock))
        else:
            rank.device = max(rank.device + work.device, rank.clock)

    def _synchronised(self, rank: _Rank) -> bool:
        """Whether the GPU is done; if not, the host goes on at the same place once it is."""
        if rank.queue:
            rank.waits_for_device = True
            return False
        rank.wait_for_device()
        return True

    def _resume(self, rank: _Rank, time: float) -> None:
        """The instruction at hand is done at ``time``; go on."""
        rank.clock = time
        rank.device = max(rank.device, time)
        rank.at += 1
        self._at(time, partial(self._go_on, rank))

    def _mark(self, rank: _Rank, mark: Mark) -> None:
        if mark.kind != "phase":
            return
        rank.close_compute()
        if rank.phase is not None:
            name, start = rank.phase
            rank.note(start, rank.clock, "phase", name)
        rank.phase = None if mark.name == "end" else (mark.name, rank.clock)

    # -- kernels --------------------------------------------------------------------------------

    def _kernels(self, rank: _Rank, item: Instruction) -> bool:
        """Start what concerns the node's disk and cores, as an event; the host waits for it."""
        # A walk's calls queue behind what the GPU has to do, and a walk ends with the GPU done.
        if isinstance(item, KernelWork | WalkRun) and not self._synchronised(rank):
            return False
        rank.close_compute()
        if isinstance(item, FirstUse):
            self._at(rank.clock, lambda time: self._first_use(rank, item, time))
        elif isinstance(item, WalkRun):
            self._at(rank.clock, lambda time: self._walk(rank, item, time))
        elif isinstance(item, KernelWork):
            self._at(rank.clock, lambda time: self._kernel_work(rank, item, time))
        return False

    def _first_use(self, rank: _Rank, item: FirstUse, time: float) -> None:
        def work(granted: float) -> None:
            def done(end: float) -> None:
                self._locks.release(lock, end)
                self._resume(rank, end)

            self._bring_in(rank, item.kernels, granted, done, bulk=item.bulk)

        lock = item.lock and (rank.node, *item.lock)
        self._locks.acquire(lock, time, work, lambda start, end: self._note_lock(rank, start, end))

    def _walk(self, rank: _Rank, item: WalkRun, time: float) -> None:
        def part(index: int, now: float) -> None:
            if index == len(item.steps):
                self._locks.release(lock, now)
                self._resume(rank, now)
                return
            kernels, seconds = item.steps[index]

            def called(ready: float) -> None:
                rank.note(ready, ready + seconds, "load", item.name)
                self._at(ready + seconds, lambda end: part(index + 1, end))

            self._bring_in(rank, kernels, now, called, bulk=False)

        lock = item.lock and (rank.node, *item.lock)
        self._locks.acquire(
            lock, time, lambda now: part(0, now),
            lambda start, end: self._note_lock(rank, start, end),
        )  # fmt: skip

    def _note_lock(self, rank: _Rank, start: float, end: float) -> None:
        if end > start:
            rank.note(start, end, "wait", "compile lock")

    def _bring_in(
        self, rank: _Rank, kernels: Sequence[Kernel], time: float, done: Callable[[float], None],
        *, bulk: bool,
    ) -> None:  # fmt: skip
        """Find the first kernel on disk or compile it, then the others, then ``done(end)``."""
        if not kernels:
            done(time)
            return
        kernel, rest = kernels[0], kernels[1:]

        def load(ready: float) -> None:
            end = ready + self._costs.load_seconds(kernel, bulk=bulk)
            if end > ready:
                rank.note(ready, end, "load", kernel.name)
            self._at(end, lambda now: self._bring_in(rank, rest, now, done, bulk=bulk))

        def compiled(end: float) -> None:
            rank.note(time, end, "compile", kernel.name, kernel.identity)
            self._disk[rank.node].add(kernel)
            load(end)

        if kernel in self._disk[rank.node]:
            load(time)
            return
        self._cores[rank.node].start(time, self._costs.compile_seconds(kernel), compiled)
        self._plan_end(rank.node)

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

    def _kernel_work(self, rank: _Rank, op: KernelWork, start: float) -> None:
        """Build or verify; the builder has its node's cores to itself, since all wait for it."""
        disk = self._disk[rank.node]
        if op.action == "verify":
            end = start + sum(map(self._costs.verify_seconds, op.kernels))
            if end > start:
                rank.note(start, end, "load", op.name)
            self._resume(rank, end)
            return
        missing = [kernel for kernel in op.kernels if kernel not in disk]
        spans = self._costs.build_spans(missing, self._cores_per_node)
        for kernel, began, ended in spans:
            name, key = (kernel.name, kernel.identity) if kernel else ("front end", "")
            rank.note(start + began, start + ended, "compile", name, key)
        disk.update(missing)
        self._resume(rank, start + max((ended for _, _, ended in spans), default=0.0))

    # -- communication --------------------------------------------------------------------------

    def _communicate(self, rank: _Rank, op: Collective | Send | Recv) -> bool:
        """Queue it; False where the host waits for it."""
        waits = not self._run_ahead or isinstance(op, Recv) or op.name in OF_HOSTS
        if waits and not self._synchronised(rank):
            return False
        rank.close_compute()
        key = rank.next_key(_where(rank.index, op))
        rank.queue.append(_Queued(op, rank.clock, key, host_waits=waits))
        rank.at += 1
        self._work_off([rank])
        return self._synchronised(rank) if waits else True

    def _work_off(self, ranks: Iterable[_Rank]) -> None:
        """Let GPUs do what they can of their queues, and those who wait for that, and so on."""
        todo = deque(ranks)
        while todo:
            rank = todo.popleft()
            while rank.queue and self._done(rank, rank.queue[0], todo):
                rank.queue.popleft()
            if rank.waits_for_device and not rank.queue:
                rank.waits_for_device = False
                rank.wait_for_device()
                self._at(rank.clock, partial(self._go_on, rank))

    def _done(self, rank: _Rank, item: _Queued, todo: deque[_Rank]) -> bool:
        """Whether the GPU gets past the head of its queue."""
        work = item.work
        if isinstance(work, Run):
            rank.device = max(rank.device + work.device, item.at)
            return True
        if item.end is None and item.arrived is None:
            item.arrived = max(rank.device, item.at)
            if isinstance(work, Collective):
                self._arrive(rank, item, work, todo)
            elif isinstance(work, Send):
                self._send(rank, item, work, todo)
            else:
                self._receivers[item.key] = rank
        if isinstance(work, Recv) and item.key in self._sent:
            self._receive(rank, item, work)
        if item.end is None:
            rank.waiting_in = _waiting_in(work)
            return False
        rank.device = item.end
        if item.host_waits:
            # Nothing else is queued then, and the span of the communication is the host's wait.
            rank.clock = item.end
        else:
            rank.communicated = item.end
        return True

    def _arrive(self, rank: _Rank, item: _Queued, op: Collective, todo: deque[_Rank]) -> None:
        arrivals = self._arrivals.setdefault(item.key, [])
        arrivals.append((rank, item))
        if len(arrivals) < len(op.group):
            return
        del self._arrivals[item.key]
        last, its = max(arrivals, key=lambda pair: _arrived(pair[1]))
        end = _arrived(its) + self._costs.collective_seconds(op)
        if op.name == EXCHANGE:
            self._share_disks(op.group)
        for member, one in arrivals:
            self._check_wait(member, one, last.index, _arrived(its))
            self._note(member, one, end)
            one.end = end
            if member is not rank:
                todo.append(member)

    def _share_disks(self, group: Sequence[int]) -> None:
        nodes = {self._ranks[index].node for index in group}
        self._exchanged |= nodes
        disks = [self._disk[node] for node in nodes]
        everything = set().union(*disks)
        for disk in disks:
            disk.update(everything)

    def _send(self, rank: _Rank, item: _Queued, op: Send, todo: deque[_Rank]) -> None:
        """A send does not wait for its receiver."""
        at = _arrived(item)
        self._sent[item.key] = (at, at + self._costs.transfer_seconds(op.bytes))
        item.end = at
        self._note(rank, item, at)
        if item.key in self._receivers:
            todo.append(self._receivers[item.key])

    def _receive(self, rank: _Rank, item: _Queued, op: Recv) -> None:
        sent, there = self._sent.pop(item.key)
        self._receivers.pop(item.key, None)
        arrived = _arrived(item)
        item.end = max(arrived, there)
        self._check_wait(rank, item, op.peer, sent)
        self._note(rank, item, item.end)

    def _note(self, rank: _Rank, item: _Queued, end: float) -> None:
        """Communication, on the rank's own time line only where its host has to wait for it."""
        assert not isinstance(item.work, Run)
        span = Span(rank.index, _arrived(item), end, "comm", _name(item.work), item.key)
        self._communication.append(span)
        if item.host_waits or isinstance(item.work, Send):
            rank.spans.append(span)

    def _check_wait(self, rank: _Rank, item: _Queued, last: int, arrival: float) -> None:
        """Hold a wait against its limit: of the GPU's communication, or of hosts that talk."""
        of_hosts = self._run_ahead and item.host_waits
        limit = self._host_timeout if of_hosts else self._timeout
        waited = arrival - item.at
        self._longest_waits[of_hosts] = max(self._longest_waits[of_hosts], waited)
        if limit is not None and waited > limit:
            assert not isinstance(item.work, Run)
            lost = CollectiveTimeout(
                item.at + limit, rank.index, _name(item.work), last, "", waited, of_hosts
            )
            self._timeouts.append(lost)

    def _first_timeout(self, spans: list[Span]) -> CollectiveTimeout | None:
        """The time-out that ends the run, with what the whole run would have needed."""
        if not self._timeouts:
            return None
        first = min(self._timeouts, key=lambda timeout: timeout.time)
        needed = self._longest_waits[first.of_hosts]
        busy = [span for span in spans if span.kind in WORK]
        return with_culprit(replace(first, needed=needed), [*busy, *self._communication])


def _arrived(item: _Queued) -> float:
    assert item.arrived is not None
    return item.arrived


def _where(rank: int, op: Collective | Send | Recv) -> str:
    """Whom an operation is among: the same text on all ranks that take part."""
    if isinstance(op, Collective):
        return ",".join(map(str, op.group))
    return f"{rank}>{op.peer}" if isinstance(op, Send) else f"{op.peer}>{rank}"


def _name(op: Collective | Send | Recv) -> str:
    prefix = {Collective: "", Send: "send ", Recv: "recv "}[type(op)]
    return f"{prefix}{op.name}"


def _waiting_in(op: Collective | Send | Recv) -> str:
    if isinstance(op, Collective):
        return f"{op.name} of ranks {op.group}"
    return f"recv {op.name} from rank {op.peer}"
