"""Messages between simulated ranks: who meets whom, when, and how long the others waited."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from runner.schedule import EXCHANGE, OF_HOSTS, Await, Begin, Collective, Recv, Send
from runner.timeline import Span
from sim.costs.model import CostModel
from sim.engine.async_collectives import Beside
from sim.engine.rank import Message, Queued, Rank
from sim.engine.rank_program import Run
from sim.engine.timeout_diagnosis import WORK, CollectiveTimeout, with_culprit


class Network:
    """Collectives, sends and receives.

    Args:
        costs: how long a message takes.
        timeout: longest wait of a rank, in seconds; None is no limit.
        host_timeout: the same of what hosts do among themselves where they run ahead.
        run_ahead: whether hosts queue messages and go on.
        exchanged: told the ranks that exchange what their nodes built.
    """

    def __init__(
        self,
        costs: CostModel,
        *,
        timeout: float | None,
        host_timeout: float | None,
        run_ahead: bool,
        exchanged: Callable[[Sequence[int]], None],
    ) -> None:
        self.longest_waits = {False: 0.0, True: 0.0}
        self._costs, self._run_ahead, self._exchanged = costs, run_ahead, exchanged
        self._timeout, self._host_timeout = timeout, host_timeout
        self._beside = Beside(costs, self._check_begun)
        self._arrivals: dict[str, list[tuple[Rank, Queued]]] = {}
        self._sent: dict[str, tuple[float, float]] = {}
        self._receivers: dict[str, Rank] = {}
        self._timeouts: list[CollectiveTimeout] = []
        self._communication: list[Span] = []

    def gets_past(self, rank: Rank, item: Queued, todo: deque[Rank]) -> bool:
        """Whether a GPU gets past the head of its queue; ``todo`` gets whom that lets go on."""
        work = item.work
        if isinstance(work, Run):
            rank.device = max(rank.device + work.device, item.at)
            return True
        if isinstance(work, Begin | Await):
            return self._goes_beside(rank, item, work, todo)
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
            rank.waiting_in = waiting_in(work)
            return False
        rank.device = item.end
        if item.host_waits:
            # Nothing else is queued then, and the span of the communication is the host's wait.
            rank.clock = item.end
        else:
            rank.communicated = item.end
        return True

    def _goes_beside(
        self, rank: Rank, item: Queued, work: Begin | Await, todo: deque[Rank]
    ) -> bool:
        if isinstance(work, Begin):
            self._beside.begin(rank, item, work, todo)
            return True
        if not self._beside.passes(rank, item, work):
            rank.waiting_in = f"{work.name}, which others have not begun"
            return False
        if item.host_waits:
            rank.clock = rank.device
        else:
            rank.communicated = rank.device
        return True

    def _arrive(self, rank: Rank, item: Queued, op: Collective, todo: deque[Rank]) -> None:
        arrivals = self._arrivals.setdefault(item.key, [])
        arrivals.append((rank, item))
        if len(arrivals) < len(op.group):
            return
        del self._arrivals[item.key]
        last, its = max(arrivals, key=lambda pair: _arrived(pair[1]))
        start = _arrived(its)
        if op.name not in OF_HOSTS:
            start = max(start, self._beside.link_free(op.group))
        end = start + self._costs.collective_seconds(op)
        if op.name not in OF_HOSTS:
            self._beside.take_link(op.group, end)
        if op.name == EXCHANGE:
            self._exchanged(op.group)
        for member, one in arrivals:
            self._check_wait(member, one, last.index, _arrived(its))
            self._note(member, one, end)
            one.end = end
            if member is not rank:
                todo.append(member)

    def _send(self, rank: Rank, item: Queued, op: Send, todo: deque[Rank]) -> None:
        """A send does not wait for its receiver."""
        at = _arrived(item)
        self._sent[item.key] = (at, at + self._costs.transfer_seconds(op.bytes))
        item.end = at
        self._note(rank, item, at)
        if item.key in self._receivers:
            todo.append(self._receivers[item.key])

    def _receive(self, rank: Rank, item: Queued, op: Recv) -> None:
        sent, there = self._sent.pop(item.key)
        self._receivers.pop(item.key, None)
        arrived = _arrived(item)
        item.end = max(arrived, there)
        self._check_wait(rank, item, op.peer, sent)
        self._note(rank, item, item.end)

    def _note(self, rank: Rank, item: Queued, end: float) -> None:
        """Communication, on the rank's own time line only where its host has to wait for it."""
        assert not isinstance(item.work, Run | Await)
        span = Span(rank.index, _arrived(item), end, "comm", _name(item.work), item.key)
        self._communication.append(span)
        if item.host_waits or isinstance(item.work, Send):
            rank.spans.append(span)

    def _check_wait(self, rank: Rank, item: Queued, last: int, arrival: float) -> None:
        """Hold a wait against its limit: of the GPU's communication, or of hosts that talk."""
        assert not isinstance(item.work, Run | Await)
        of_hosts = self._run_ahead and item.host_waits
        self._check_limit(rank, item.at, item.work, last, arrival, of_hosts=of_hosts)

    def _check_begun(
        self, rank: Rank, since: float, item: Queued, last: int, arrival: float
    ) -> None:
        """The same of a collective that was begun, which the rank may not wait for yet."""
        op = item.work
        assert isinstance(op, Begin)
        self._communication.append(Span(rank.index, since, arrival, "comm", op.name, item.key))
        self._check_limit(rank, since, op, last, arrival, of_hosts=False)

    def _check_limit(
        self, rank: Rank, since: float, op: Message, last: int, arrival: float, *, of_hosts: bool
    ) -> None:
        limit = self._host_timeout if of_hosts else self._timeout
        waited = arrival - since
        self.longest_waits[of_hosts] = max(self.longest_waits[of_hosts], waited)
        if limit is not None and waited > limit:
            lost = CollectiveTimeout(
                since + limit, rank.index, _name(op), last, "", waited, of_hosts
            )
            self._timeouts.append(lost)

    def first_timeout(self, spans: Sequence[Span]) -> CollectiveTimeout | None:
        """The time-out that ends the run, with what the whole run would have needed."""
        if not self._timeouts:
            return None
        first = min(self._timeouts, key=lambda timeout: timeout.time)
        needed = self.longest_waits[first.of_hosts]
        busy = [span for span in spans if span.kind in WORK]
        return with_culprit(replace(first, needed=needed), [*busy, *self._communication])


def _arrived(item: Queued) -> float:
    assert item.arrived is not None
    return item.arrived


def among(rank: int, op: Message) -> str:
    """Whom an operation is among: the same text on all ranks that take part."""
    if isinstance(op, Collective | Begin):
        return ",".join(map(str, op.group))
    return f"{rank}>{op.peer}" if isinstance(op, Send) else f"{op.peer}>{rank}"


def _name(op: Message) -> str:
    prefix = {Collective: "", Begin: "", Send: "send ", Recv: "recv "}[type(op)]
    return f"{prefix}{op.name}"


def waiting_in(op: Message) -> str:
    """What a rank that waits for it is in."""
    if isinstance(op, Collective | Begin):
        return f"{op.name} of ranks {op.group}"
    return f"recv {op.name} from rank {op.peer}"
