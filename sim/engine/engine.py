"""The event engine runs every rank's program in virtual time.

A rank has two clocks, its host's and its GPU's. The host runs freely through work that concerns
only itself, and stops where others are involved: at a kernel that is not loaded (its node's disk
and cores), at a lock, and where it waits for its GPU. The GPU runs the work that the host has
queued; a collective ends only after every member's GPU has reached it. A host waits for its GPU
after each message, as our driver does. A host that runs ahead waits only for what it receives and
at the end of a forward, as a server over NCCL does.

There is one heap of (time, priority, tie, event). An event is a rank whose host resumes, or the
cores of a machine on which a compile may end. At equal times, compiles end before hosts resume, and
events go in the order in which they were scheduled. A rank that misses a kernel while another rank
compiles it compiles it too, as the library does, unless first uses are locked.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from runner.kernels.kernel import Kernel
from runner.schedule import OF_HOSTS, Await, Begin, Capture, KernelWork, Mark, Message, Recv
from runner.timeline import Span
from sim.costs.profile_costs import ProfileCosts
from sim.engine.network import Network, describe_wait
from sim.engine.rank_program import FirstUse, Instruction, LockKey, Run, WalkRun
from sim.engine.state import Cores, Host, Node, Queued, Rank
from sim.engine.timeout_diagnosis import CollectiveTimeout, WaitLimits


@dataclass(frozen=True)
class Outcome:
    """Result of a simulation."""

    spans: list[Span]  # raw, see runner.timeline.merge
    timeout: CollectiveTimeout | None  # the wait that would have ended the run
    disks: dict[int, frozenset[Kernel]] = field(default_factory=dict)  # by node, at the end
    longest_wait: float = 0.0  # seconds of the longest wait that Engine's ``timeout`` limits
    ends: tuple[float, ...] = ()  # when each rank finished
    up: dict[int, frozenset[Kernel]] = field(default_factory=dict)  # disks when the server is up


class SimulationError(Exception):
    """The schedule cannot finish: ranks wait for something that never comes."""


class Engine:
    """Replays all ranks' programs.

    Args:
        programs: each rank's program; see :class:`sim.engine.rank_program.ProgramCompiler`.
        costs: how long operations take.
        node_of: node of each rank; ranks of a node share its disk cache and cores.
        cores_per_node: cores that a builder uses.
        host_of: machine of each node, whose cores its nodes share; by default one per node.
        timeout: longest wait of a rank in a communication, in seconds; None means no limit.
        host_timeout: longest wait of hosts that run ahead, to receive from another stage or to
            exchange kernels.
        cached: kernels on every node's disk at the start.
        run_ahead: whether hosts queue communication and go on, until a forward's end.
        start: seconds since the origin at which all ranks start.
    """

    def __init__(
        self,
        programs: Sequence[Sequence[Instruction]],
        costs: ProfileCosts,
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
        self._limits = WaitLimits(timeout, host_timeout, run_ahead)
        self._network = Network(costs, self._limits)
        hosts = {node: node if host_of is None else host_of[node] for node in node_of}
        cores = {host: Cores(costs) for host in hosts.values()}
        self._nodes = {
            node: Node(cores[host], set(cached), set(cached)) for node, host in hosts.items()
        }
        self._ranks = [
            Rank(index, self._nodes[node_of[index]], program, start)
            for index, program in enumerate(programs)
        ]
        self._now = start
        self._events: list[tuple[float, int, int, Rank | Cores]] = []
        self._tie = count()

    def run(self) -> Outcome:
        """Run to the end.

        Raises:
            SimulationError: some ranks wait forever.
        """
        for rank in self._ranks:
            rank.host = self._run_host(rank)
            self._resume(rank)
        while self._events:
            self._now, _, _, event = heapq.heappop(self._events)
            if isinstance(event, Rank):
                self._resume(event)
            else:
                self._end_compiles(event)
        stuck = [rank for rank in self._ranks if not rank.done]
        if stuck:
            waits = (f"rank {rank.index} in {describe_wait(rank.queue[0])}" for rank in stuck[:4])
            raise SimulationError(f"{len(stuck)} ranks wait forever: {', '.join(waits)}")
        spans = [span for rank in self._ranks for span in rank.spans]
        return Outcome(
            spans,
            self._limits.first_timeout(spans),
            {index: frozenset(node.disk) for index, node in self._nodes.items()},
            self._limits.longest[False],
            tuple(rank.clock for rank in self._ranks),
            {index: frozenset(node.up) for index, node in self._nodes.items()},
        )

    def _schedule(self, time: float, event: Rank | Cores) -> None:
        priority = 0 if isinstance(event, Cores) else 1
        heapq.heappush(self._events, (time, priority, next(self._tie), event))

    def _resume(self, rank: Rank) -> None:
        """Run a rank's host until it has to wait."""
        time = next(rank.host, None)
        if time is not None:
            self._schedule(time, rank)

    def _end_compiles(self, cores: Cores) -> None:
        # An end scheduled before another compile started comes too early: no compile ends then.
        ended = cores.finish(self._now)
        for rank in ended:
            self._resume(rank)
        if ended and cores.compiles:
            self._schedule(cores.next_end(), cores)

    # -- hosts ----------------------------------------------------------------------------------

    def _run_host(self, rank: Rank) -> Host:
        for item in rank.program:
            if isinstance(item, Run):
                rank.compute(item)
            elif isinstance(item, FirstUse):
                yield from self._first_use(rank, item)
            elif isinstance(item, WalkRun):
                yield from self._walk(rank, item)
            elif isinstance(item, KernelWork):
                yield from self._kernel_work(rank, item)
            elif isinstance(item, Capture):
                rank.compute(Run(self._costs.capture_seconds(item), 0.0))
            elif isinstance(item, Mark):
                if item.kind == "phase" or self._run_ahead:
                    yield from self._wait_for_device(rank)
                rank.mark(item)
            else:
                yield from self._communicate(rank, item)
        yield from self._wait_for_device(rank)
        rank.end_compute()
        rank.done = True

    def _wait_for_device(self, rank: Rank) -> Host:
        if rank.queue:
            rank.waits_for_device = True
            yield None
        else:
            rank.wait_for_device()

    def _first_use(self, rank: Rank, item: FirstUse) -> Host:
        rank.end_compute()
        yield rank.clock
        yield from self._acquire(rank, item.lock)
        for kernel in item.kernels:
            yield from self._load(rank, kernel, bulk=item.bulk)
        yield self._release(rank, item.lock)

    def _walk(self, rank: Rank, item: WalkRun) -> Host:
        """Run a walk: its calls queue on the GPU, and it ends when the GPU is done."""
        yield from self._wait_for_device(rank)
        rank.end_compute()
        yield rank.clock
        yield from self._acquire(rank, item.lock)
        for kernels, seconds in item.steps:
            for kernel in kernels:
                yield from self._load(rank, kernel, bulk=False)
            rank.note(self._now, self._now + seconds, "load", item.name)
            yield self._now + seconds
        yield self._release(rank, item.lock)

    def _acquire(self, rank: Rank, lock: LockKey | None) -> Host:
        if lock is None:
            return
        waiting = rank.node.locks.get(lock)
        if waiting is None:
            rank.node.locks[lock] = deque()
            return
        since = self._now
        waiting.append(rank)
        yield None
        if self._now > since:
            rank.note(since, self._now, "wait", "compile lock")

    def _release(self, rank: Rank, lock: LockKey | None) -> float:
        """Hand the lock to the rank that asked first; the previous holder goes on now."""
        if lock is not None and rank.node.locks[lock]:
            self._schedule(self._now, rank.node.locks[lock].popleft())
        elif lock is not None:
            del rank.node.locks[lock]
        return rank.go_on_at(self._now)

    def _load(self, rank: Rank, kernel: Kernel, *, bulk: bool) -> Host:
        """Load a kernel from the node's disk; compile it first if it is missing."""
        node, since = rank.node, self._now
        rank.use([kernel])
        if kernel not in node.disk:
            node.cores.start(rank, self._costs.compile_seconds(kernel), since)
            self._schedule(node.cores.next_end(), node.cores)
            yield None
            rank.note(since, self._now, "compile", kernel.name, kernel.identity)
            node.disk.add(kernel)
        end = self._now + self._costs.load_seconds(bulk=bulk)
        if end > self._now:
            rank.note(self._now, end, "load", kernel.name)
        yield end

    def _kernel_work(self, rank: Rank, op: KernelWork) -> Host:
        """Build or verify; a builder has its node's cores to itself, since all wait for it."""
        yield from self._wait_for_device(rank)
        rank.end_compute()
        yield rank.clock
        start = end = self._now
        rank.use(op.kernels)
        if op.action == "verify":
            end += self._costs.verify_seconds() * len(op.kernels)
            if end > start:
                rank.note(start, end, "load", op.name)
        else:
            missing = [kernel for kernel in op.kernels if kernel not in rank.node.disk]
            for kernel, since, until in self._costs.build_spans(missing, self._cores_per_node):
                name, key = (kernel.name, kernel.identity) if kernel else ("front end", "")
                rank.note(start + since, start + until, "compile", name, key)
                end = max(end, start + until)
            rank.node.disk.update(missing)
        yield rank.go_on_at(end)

    # -- GPUs -----------------------------------------------------------------------------------

    def _communicate(self, rank: Rank, op: Message | Await) -> Host:
        """Queue a message; the host waits for it or runs ahead."""
        waits = not self._run_ahead or isinstance(op, Recv) or op.name in OF_HOSTS
        waits = waits and not isinstance(op, Begin)
        if waits:
            yield from self._wait_for_device(rank)
        rank.end_compute()
        key = "" if isinstance(op, Await) else rank.keys.next_key(op)
        rank.queue.append(Queued(op, rank.clock, key, waits))
        self._run_devices(rank)
        if waits:
            yield from self._wait_for_device(rank)

    def _run_devices(self, first: Rank) -> None:
        """Run a GPU's queue, and the queues of the GPUs that wait for its messages."""
        unblocked = deque([first])
        while unblocked:
            rank = unblocked.popleft()
            while rank.queue:
                item = rank.queue[0]
                if isinstance(item.work, Run):
                    item.end = max(rank.device + item.work.device, item.queued)
                elif item.arrived is None:
                    item.arrived = max(rank.device, item.queued)
                    unblocked.extend(self._network.arrive(rank, item))
                if item.end is None:
                    break
                rank.pass_head()
            if rank.waits_for_device and not rank.queue:
                rank.waits_for_device = False
                rank.wait_for_device()
                self._schedule(rank.clock, rank)
