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
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from runner.kernels.kernel import Kernel
from runner.schedule import (
    OF_HOSTS,
    Await,
    Begin,
    Capture,
    Collective,
    KernelWork,
    Mark,
    Recv,
    Send,
)
from runner.timeline import Span
from sim.costs.model import CostModel
from sim.engine.locks import Locks
from sim.engine.network import Network, among
from sim.engine.nodes import Nodes
from sim.engine.rank import Message, Queued, Rank
from sim.engine.rank_program import FirstUse, Instruction, Run, WalkRun
from sim.engine.timeout_diagnosis import CollectiveTimeout


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


class Engine:
    """Replays the programs of all ranks.

    Args:
        programs: what every rank does; see :func:`sim.engine.rank_program.compile_program`.
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
        self._costs, self._run_ahead, self._cores_per_node = costs, run_ahead, cores_per_node
        self._ranks = [
            Rank(index, program, node_of[index], start, start)
            for index, program in enumerate(programs)
        ]
        self._events: list[tuple[float, int, int, Callable[[float], None]]] = []
        self._tie = count()
        self._locks = Locks(self._at)
        self._nodes = Nodes(costs, node_of, host_of, cached, self._at)
        self._network = Network(
            costs,
            timeout=timeout,
            host_timeout=host_timeout,
            run_ahead=run_ahead,
            exchanged=self._nodes.exchange,
        )

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
        return Outcome(
            spans,
            self._network.first_timeout(spans),
            {node: frozenset(disk) for node, disk in self._nodes.disks.items()},
            self._network.longest_waits[False],
            tuple(rank.clock for rank in self._ranks),
            self._nodes.up(self._ranks),
        )

    def _at(self, time: float, action: Callable[[float], None], priority: int = 1) -> None:
        heapq.heappush(self._events, (time, priority, next(self._tie), action))

    # -- a rank's host --------------------------------------------------------------------------

    def _advance(self, rank: Rank) -> None:
        """Run a rank's host until it meets others or ends."""
        while rank.at < len(rank.program):
            if not self._step(rank, rank.program[rank.at]):
                return
        if self._synchronised(rank):
            rank.close_compute()
            rank.done = True

    def _go_on(self, rank: Rank, _: float) -> None:
        self._advance(rank)

    def _step(self, rank: Rank, item: Instruction) -> bool:
        """Do an instruction; False where the host has to wait in or before it."""
        if isinstance(item, Run):
            self._compute(rank, item)
        elif isinstance(item, Collective | Begin | Await | Send | Recv):
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

    def _compute(self, rank: Rank, work: Run) -> None:
        if rank.computing_since is None:
            rank.computing_since = rank.clock
        rank.clock += work.host
        if rank.queue:
            rank.queue.append(Queued(work, rank.clock))
        else:
            rank.device = max(rank.device + work.device, rank.clock)

    def _synchronised(self, rank: Rank) -> bool:
        """Whether the GPU is done; if not, the host goes on at the same place once it is."""
        if rank.queue:
            rank.waits_for_device = True
            return False
        rank.wait_for_device()
        return True

    def _resume(self, rank: Rank, time: float) -> None:
        """The instruction at hand is done at ``time``; go on."""
        rank.clock = time
        rank.device = max(rank.device, time)
        rank.at += 1
        self._at(time, partial(self._go_on, rank))

    def _mark(self, rank: Rank, mark: Mark) -> None:
        if mark.kind != "phase":
            return
        rank.close_compute()
        if rank.phase is not None:
            name, start = rank.phase
            rank.note(start, rank.clock, "phase", name)
        rank.phase = None if mark.name == "end" else (mark.name, rank.clock)

    # -- kernels --------------------------------------------------------------------------------

    def _kernels(self, rank: Rank, item: Instruction) -> bool:
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

    def _first_use(self, rank: Rank, item: FirstUse, time: float) -> None:
        def work(granted: float) -> None:
            def done(end: float) -> None:
                self._locks.release(lock, end)
                self._resume(rank, end)

            self._nodes.bring_in(rank, item.kernels, granted, done, bulk=item.bulk)

        lock = item.lock and (rank.node, *item.lock)
        self._locks.acquire(lock, time, work, lambda start, end: self._note_lock(rank, start, end))

    def _walk(self, rank: Rank, item: WalkRun, time: float) -> None:
        def part(index: int, now: float) -> None:
            if index == len(item.steps):
                self._locks.release(lock, now)
                self._resume(rank, now)
                return
            kernels, seconds = item.steps[index]

            def called(ready: float) -> None:
                rank.note(ready, ready + seconds, "load", item.name)
                self._at(ready + seconds, lambda end: part(index + 1, end))

            self._nodes.bring_in(rank, kernels, now, called, bulk=False)

        lock = item.lock and (rank.node, *item.lock)
        self._locks.acquire(
            lock,
            time,
            lambda now: part(0, now),
            lambda start, end: self._note_lock(rank, start, end),
        )

    def _note_lock(self, rank: Rank, start: float, end: float) -> None:
        if end > start:
            rank.note(start, end, "wait", "compile lock")

    def _kernel_work(self, rank: Rank, op: KernelWork, start: float) -> None:
        """Build or verify; the builder has its node's cores to itself, since all wait for it."""
        disk = self._nodes.disks[rank.node]
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

    def _communicate(self, rank: Rank, op: Message | Await) -> bool:
        """Queue it; False where the host waits for it."""
        waits = not self._run_ahead or isinstance(op, Recv) or op.name in OF_HOSTS
        waits = waits and not isinstance(op, Begin)
        if waits and not self._synchronised(rank):
            return False
        rank.close_compute()
        key = "" if isinstance(op, Await) else rank.next_key(among(rank.index, op))
        rank.queue.append(Queued(op, rank.clock, key, host_waits=waits))
        rank.at += 1
        self._work_off([rank])
        return self._synchronised(rank) if waits else True

    def _work_off(self, ranks: Iterable[Rank]) -> None:
        """Let GPUs do what they can of their queues, and those who wait for that, and so on."""
        todo = deque(ranks)
        while todo:
            rank = todo.popleft()
            while rank.queue and self._network.gets_past(rank, rank.queue[0], todo):
                rank.queue.popleft()
            if rank.waits_for_device and not rank.queue:
                rank.waits_for_device = False
                rank.wait_for_device()
                self._at(rank.clock, partial(self._go_on, rank))
