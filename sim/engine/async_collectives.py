"""Collectives that go on beside what their ranks do: a communication stream for each rank.

A collective is begun when its rank's GPU comes to that point, and runs once every member has begun
it and the links of all are free: two collectives would share a link's bandwidth, so one waits for
the other, those that a rank waits for at once among them. Ranks of a group begin theirs in one
order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from runner.schedule import Await, Begin
from runner.timeline import Span
from sim.costs.model import CostModel
from sim.engine.rank import Queued, Rank

CheckWait = Callable[[Rank, float, Queued, int, float], None]
"""Told of a member's wait: the rank, since when, for what, whom for, until when."""


@dataclass
class _UnderWay:
    """A collective that some ranks have begun: when each did, and when it ends."""

    begun: list[tuple[Rank, float]] = field(default_factory=list)
    end: float | None = None
    waiting: list[Rank] = field(default_factory=list)


class Beside:
    """All communication streams; ``costs`` tells how long a collective takes."""

    def __init__(self, costs: CostModel, check_wait: CheckWait) -> None:
        self._costs, self._check_wait = costs, check_wait
        self._under_way: dict[str, _UnderWay] = {}
        self._last: dict[tuple[int, str], _UnderWay] = {}
        self._free: dict[int, float] = {}

    def begin(self, rank: Rank, item: Queued, op: Begin, todo: deque[Rank]) -> None:
        """A rank's GPU has come to the start of a collective; it goes on at once."""
        rank.device = max(rank.device, item.at)
        one = self._under_way.setdefault(item.key, _UnderWay())
        one.begun.append((rank, rank.device))
        self._last[rank.index, op.name] = one
        if len(one.begun) < len(op.group):
            return
        del self._under_way[item.key]
        last, arrival = max(one.begun, key=lambda pair: pair[1])
        ready = [max(at, self._free.get(member.index, 0.0)) for member, at in one.begun]
        one.end = max(ready) + self._costs.collective_seconds(op)
        for (member, at), since in zip(one.begun, ready, strict=True):
            self._check_wait(member, at, item, last.index, arrival)
            self._free[member.index] = one.end
            member.spans.append(Span(member.index, since, one.end, "beside", op.name, item.key))
        todo.extend(one.waiting)

    def link_free(self, ranks: Iterable[int]) -> float:
        """When the links of all these ranks are done with what was begun."""
        if not self._free:
            return 0.0
        return max(self._free.get(rank, 0.0) for rank in ranks)

    def take_link(self, ranks: Iterable[int], end: float) -> None:
        """The links of these ranks are busy until then with what they wait for themselves."""
        if self._free:
            self._free.update(dict.fromkeys(ranks, end))

    def passes(self, rank: Rank, item: Queued, op: Await) -> bool:
        """Whether what a rank's GPU waits for is done; else it is told once it is."""
        one = self._last[rank.index, op.name]
        if one.end is None:
            one.waiting.append(rank)
            return False
        start = max(rank.device, item.at)
        if one.end > start:
            rank.spans.append(Span(rank.index, start, one.end, "wait", op.name))
        rank.device = max(start, one.end)
        return True
