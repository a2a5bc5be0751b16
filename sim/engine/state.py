"""State of a simulation: nodes with their disks and cores, and ranks with their clocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from runner.kernels.kernel import Kernel
from runner.planning.residency import SERVING
from runner.schedule import Await, Begin, Mark, Message, MessageKeys
from runner.timeline import Span
from sim.costs.profile_costs import ProfileCosts
from sim.engine.rank_program import Instruction, LockKey, Run

Host = Iterator[float | None]
"""A running host: yields the time at which it resumes, or None if others wake it."""


class Cores:
    """CPU cores of a machine: each of ``n`` compiles takes ``slowdown(n)`` times as long as alone.

    Attributes:
        compiles: rank of each running compile and the progress at which it ends, by start.
    """

    def __init__(self, costs: ProfileCosts) -> None:
        self._costs = costs
        self._now = 0.0
        # Progress, in uncontended seconds, of a compile that runs all the time.
        self._progress = 0.0
        self.compiles: list[tuple[Rank, float]] = []

    def start(self, rank: Rank, seconds: float, now: float) -> None:
        """Start a compile that takes ``seconds`` when it runs alone."""
        self._advance(now)
        self.compiles.append((rank, self._progress + seconds))

    def next_end(self) -> float:
        """When the next compile ends, unless another one starts before then."""
        work = min(end for _, end in self.compiles) - self._progress
        return self._now + work * self._costs.slowdown(len(self.compiles))

    def finish(self, now: float) -> list[Rank]:
        """Ranks whose compiles have ended, ordered by start."""
        self._advance(now)
        done = self._progress + _ROUNDING
        ended = [rank for rank, end in self.compiles if end <= done]
        self.compiles = [running for running in self.compiles if running[1] > done]
        return ended

    def _advance(self, now: float) -> None:
        if self.compiles:
            self._progress += (now - self._now) / self._costs.slowdown(len(self.compiles))
        self._now = now


_ROUNDING = 1e-9


@dataclass(eq=False)
class Node:
    """A node's cache and cores, which its ranks share."""

    cores: Cores
    disk: set[Kernel]  # compiled kernels in its cache
    up: set[Kernel]  # those that its ranks had used or received when the server was up
    locks: dict[LockKey, deque[Rank]] = field(default_factory=dict)  # held, with waiting ranks


def share_disks(nodes: set[Node]) -> None:
    """Give each of the nodes the kernels of all of them."""
    disk = set[Kernel]().union(*(node.disk for node in nodes))
    up = set[Kernel]().union(*(node.up for node in nodes))
    for node in nodes:
        node.disk |= disk
        node.up |= up


@dataclass(slots=True, eq=False)
class Queued:
    """Work in the queue of a rank's GPU."""

    work: Run | Message | Await
    queued: float  # when the host queued it
    key: str = ""  # a message's key, see runner.schedule.MessageKeys
    host_waits: bool = False  # whether the host waits until it is done
    arrived: float | None = None  # when the GPU reached it; it may then wait for other ranks
    end: float | None = None  # when it is done; None while that depends on other ranks


class Rank:
    """A rank: a host that runs the program, and a GPU that runs a queue."""

    def __init__(
        self, index: int, node: Node, program: Sequence[Instruction], start: float
    ) -> None:
        self.index, self.node, self.program = index, node, program
        self.clock = start  # the host's time
        self.device = start  # when the GPU is done with all work not in ``queue``
        self.host: Host = iter(())
        self.queue: deque[Queued] = deque()  # its head is an unfinished message
        self.keys = MessageKeys(index)
        self.waits_for_device = False  # whether the host goes on once the queue is empty
        self.done = False
        self.spans: list[Span] = []
        self._serves = False  # whether it serves requests after the first one
        self._computing_since: float | None = None
        self._communicated = 0.0  # when the GPU last finished a message without a waiting host
        self._phase: tuple[str, float] | None = None  # name and start

    def compute(self, work: Run) -> None:
        """Add work for the host now, and for the GPU once its queue is empty."""
        if self._computing_since is None:
            self._computing_since = self.clock
        self.clock += work.host
        if self.queue:
            self.queue.append(Queued(work, self.clock))
        else:
            self.device = max(self.device + work.device, self.clock)

    def end_compute(self) -> None:
        """Record the compute span up to now."""
        if self._computing_since is not None and self.clock > self._computing_since:
            self.note(self._computing_since, self.clock, "compute", "compute")
        self._computing_since = None

    def pass_head(self) -> None:
        """Remove the head of the queue, which the GPU has finished."""
        item = self.queue.popleft()
        assert item.end is not None
        self.device = item.end
        if item.host_waits:
            # Nothing else is queued, and the message's span is the host's wait.
            self.clock = item.end
        elif not isinstance(item.work, Run | Begin):
            self._communicated = item.end

    def wait_for_device(self) -> None:
        """Resume when the GPU is done; the GPU's communication counts as a wait."""
        if self._communicated > self.clock:
            computed = self._computing_since is not None
            self.end_compute()
            self.note(self.clock, self._communicated, "wait", "GPU")
            self.clock = self._communicated
            self._computing_since = self.clock if computed else None
        self.clock = max(self.clock, self.device)

    def go_on_at(self, time: float) -> float:
        """Keep host and GPU busy until ``time``, and return it."""
        self.clock = time
        self.device = max(self.device, time)
        return time

    def use(self, kernels: Iterable[Kernel]) -> None:
        """Note kernels that the node will have when the server is up, unless it is up already."""
        if not self._serves:
            self.node.up.update(kernels)

    def mark(self, mark: Mark) -> None:
        """End a phase and begin the next one."""
        if mark.kind != "phase":
            return
        self.end_compute()
        if self._phase is not None:
            name, start = self._phase
            self.note(start, self.clock, "phase", name)
        self._phase = None if mark.name == "end" else (mark.name, self.clock)
        self._serves |= mark.name == SERVING

    def note(self, start: float, end: float, kind: str, name: str, key: str = "") -> None:
        """Add a span."""
        self.spans.append(Span(self.index, start, end, kind, name, key))
