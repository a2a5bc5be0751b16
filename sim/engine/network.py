"""Messages between ranks: who meets whom, and when.

A collective starts when the GPUs of all its members have reached it and their links are free. An
asynchronous one runs on its members' communication streams while they go on. Two collectives would
share a link's bandwidth, so one waits for the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from runner.schedule import EXCHANGE, OF_HOSTS, Await, Begin, Collective, Recv, Send
from sim.costs.profile_costs import ProfileCosts
from sim.engine.state import Queued, Rank, share_disks
from sim.engine.timeout_diagnosis import WaitLimits


@dataclass
class _Meeting:
    """A collective under way: ranks whose GPUs have reached it, and ranks that await its end."""

    members: list[tuple[Rank, Queued]] = field(default_factory=list)
    awaited: list[tuple[Rank, Queued]] = field(default_factory=list)
    end: float | None = None  # known once all members have arrived


class Network:
    """All messages under way; ``limits`` checks every wait."""

    def __init__(self, costs: ProfileCosts, limits: WaitLimits) -> None:
        self._costs, self._limits = costs, limits
        self._meetings: dict[str, _Meeting] = {}
        self._begun: dict[tuple[int, str], _Meeting] = {}
        self._link_free: dict[int, float] = {}
        self._sent: dict[str, tuple[float, float]] = {}
        self._receiving: dict[str, tuple[Rank, Queued]] = {}

    def arrive(self, rank: Rank, item: Queued) -> list[Rank]:
        """Let a rank's GPU arrive at a message, and set the ends that this decides.

        Returns:
            Other ranks that need not wait any longer.
        """
        if isinstance(item.work, Collective | Begin):
            return self._join(rank, item, item.work)
        if isinstance(item.work, Send):
            return self._send(rank, item, item.work)
        if isinstance(item.work, Recv):
            self._receiving[item.key] = rank, item
            if item.key in self._sent:
                self._receive(item.key)
        elif isinstance(item.work, Await):
            meeting = self._begun[rank.index, item.work.name]
            meeting.awaited.append((rank, item))
            if meeting.end is not None:
                _end_await(rank, item, meeting.end)
        return []

    def _join(self, rank: Rank, item: Queued, op: Collective | Begin) -> list[Rank]:
        meeting = self._meetings.setdefault(item.key, _Meeting())
        meeting.members.append((rank, item))
        if isinstance(op, Begin):
            item.end = item.arrived
            self._begun[rank.index, op.name] = meeting
        if len(meeting.members) < len(op.group):
            return []
        del self._meetings[item.key]
        last, its = max(meeting.members, key=lambda member: _arrived(member[1]))
        for member, one in meeting.members:
            self._limits.check(member, one, last.index, _arrived(its))
        end = self._start(op, _arrived(its)) + self._costs.collective_seconds(op)
        meeting.end = end
        if isinstance(op, Begin):
            return self._end_begun(meeting, op, end)
        if op.name == EXCHANGE:
            share_disks({member.node for member, _ in meeting.members})
        if op.name not in OF_HOSTS and self._link_free:
            self._link_free.update(dict.fromkeys(op.group, end))
        for member, one in meeting.members:
            self._end_message(member, one, end)
        return [member for member, _ in meeting.members if member is not rank]

    def _start(self, op: Collective | Begin, arrival: float) -> float:
        """When all members have arrived and their links are free; host collectives use none."""
        if op.name in OF_HOSTS or not self._link_free:
            return arrival
        return max(arrival, *(self._link_free.get(member, 0.0) for member in op.group))

    def _end_begun(self, meeting: _Meeting, op: Begin, end: float) -> list[Rank]:
        for member, item in meeting.members:
            since = max(_arrived(item), self._link_free.get(member.index, 0.0))
            member.note(since, end, "beside", op.name, item.key)
            self._link_free[member.index] = end
        for member, item in meeting.awaited:
            _end_await(member, item, end)
        return [member for member, _ in meeting.awaited]

    def _send(self, rank: Rank, item: Queued, op: Send) -> list[Rank]:
        """End a send, which does not wait for its receiver."""
        at = _arrived(item)
        self._sent[item.key] = at, at + self._costs.transfer_seconds(op.bytes)
        self._end_message(rank, item, at)
        return self._receive(item.key) if item.key in self._receiving else []

    def _receive(self, key: str) -> list[Rank]:
        (sent, there), (rank, item) = self._sent.pop(key), self._receiving.pop(key)
        assert isinstance(item.work, Recv)
        self._limits.check(rank, item, item.work.peer, sent)
        self._end_message(rank, item, max(_arrived(item), there))
        return [rank]

    def _end_message(self, rank: Rank, item: Queued, end: float) -> None:
        """Finish a message, which is on the rank's own time line only if its host waits for it."""
        item.end = end
        span = self._limits.add_span(rank, item, end)
        if item.host_waits or isinstance(item.work, Send):
            rank.spans.append(span)


def _end_await(rank: Rank, item: Queued, end: float) -> None:
    # Not from the arrival: the host may have compiled since then.
    start = max(_arrived(item), rank.device)
    item.end = max(start, end)
    if end > start:
        assert isinstance(item.work, Await)
        rank.note(start, end, "wait", item.work.name)


def _arrived(item: Queued) -> float:
    assert item.arrived is not None
    return item.arrived


def describe_wait(item: Queued) -> str:
    """Describe the wait of a rank whose GPU has this item at the head of its queue."""
    if isinstance(item.work, Collective | Begin):
        return f"{item.work.name} of ranks {item.work.group}"
    if isinstance(item.work, Recv):
        return f"recv {item.work.name} from rank {item.work.peer}"
    assert isinstance(item.work, Await)
    return f"{item.work.name}, which other ranks have not begun"
