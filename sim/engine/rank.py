"""A simulated rank: its two clocks, what its GPU still has to do, and what it did."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from runner.schedule import Await, Begin, Collective, Recv, Send
from runner.timeline import Span
from sim.engine.rank_program import Instruction, Run

Message = Collective | Begin | Send | Recv


@dataclass(slots=True)
class Queued:
    """Something in a rank's queue for its GPU.

    Attributes:
        work: what it is.
        at: the host's time when it was queued.
        key: a message's identity, equal on all ranks that take part.
        host_waits: whether the host waits for it.
        arrived: when the GPU came to it.
        end: when it was done.
    """

    work: Run | Message | Await
    at: float
    key: str = ""
    host_waits: bool = False
    arrived: float | None = None
    end: float | None = None


@dataclass
class Rank:
    """State of one rank.

    Attributes:
        index: world rank.
        program: what it does.
        node: where it runs.
        clock: its host's time.
        device: when its GPU will have done all that is not in ``queue``.
        at: index of the instruction at hand.
        queue: what its GPU has to do, beginning with a message that is not done.
        waits_for_device: whether the host goes on once the queue is empty.
        waiting_in: what it waits in, for errors.
        done: whether it has ended.
        spans: what it did.
        computing_since: when the work began that is not noted yet.
        communicated: when its GPU last ended a message that the host did not wait for.
        sequence: number of messages so far among each set of ranks.
        phase: name and start of the phase at hand.
    """

    index: int
    program: Sequence[Instruction]
    node: int
    clock: float
    device: float
    at: int = 0
    queue: deque[Queued] = field(default_factory=deque)
    waits_for_device: bool = False
    waiting_in: str = ""
    done: bool = False
    spans: list[Span] = field(default_factory=list)
    computing_since: float | None = None
    communicated: float = 0.0
    sequence: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    phase: tuple[str, float] | None = None

    def close_compute(self) -> None:
        """Note the work up to now."""
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
        """Add a span."""
        self.spans.append(Span(self.index, start, end, kind, name, key))

    def next_key(self, where: str) -> str:
        """Identity of the next message among these ranks."""
        self.sequence[where] += 1
        return f"{where} #{self.sequence[where]}"
