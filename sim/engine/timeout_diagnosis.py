"""Find waits that take too long, and the rank responsible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from runner.schedule import Begin, Message, message_name
from runner.timeline import Span
from sim.engine.state import Queued, Rank


@dataclass(frozen=True)
class CollectiveTimeout:
    """A wait beyond the limit, which would have ended the run."""

    time: float  # seconds since the origin
    rank: int  # the rank that gave up
    operation: str  # the communication in which it waited
    waiting_for: int  # the rank that was working, at the end of the chain of waiting ranks
    busy_with: str  # what that rank was doing then
    needed: float  # seconds of the longest wait of this kind: the smallest sufficient limit
    of_hosts: bool = False  # hosts waited for each other, which has its own limit


class WaitLimits:
    """Compares all waits with their limits.

    Args:
        limit: longest wait in a communication of GPUs, or of hosts that do not run ahead.
        host_limit: longest wait for each other of hosts that run ahead of their GPUs.
        run_ahead: whether hosts run ahead.
    """

    def __init__(self, limit: float | None, host_limit: float | None, run_ahead: bool) -> None:
        self._limits = {False: limit, True: host_limit}
        self._run_ahead = run_ahead
        self._timeouts: list[CollectiveTimeout] = []
        self._communication: list[Span] = []
        self.longest = {False: 0.0, True: 0.0}
        """Longest wait of GPUs (False) and of hosts (True)."""

    def check(self, rank: Rank, item: Queued, waiting_for: int, until: float) -> None:
        """Check a rank's wait for another rank, which lasted until ``until``."""
        assert isinstance(item.work, Message)
        of_hosts = self._run_ahead and item.host_waits
        since = item.queued
        if isinstance(item.work, Begin):
            # The rank itself goes on; only its stream waits.
            assert item.arrived is not None
            since = item.arrived
            self.add_span(rank, item, until)
        waited, limit = until - since, self._limits[of_hosts]
        self.longest[of_hosts] = max(self.longest[of_hosts], waited)
        if limit is not None and waited > limit:
            name = message_name(item.work)
            timeout = CollectiveTimeout(
                since + limit, rank.index, name, waiting_for, "", waited, of_hosts
            )
            self._timeouts.append(timeout)

    def add_span(self, rank: Rank, item: Queued, end: float) -> Span:
        """Make a message's span, and keep it to find out later who waited for whom."""
        assert isinstance(item.work, Message) and item.arrived is not None
        name = message_name(item.work)
        span = Span(rank.index, item.arrived, end, "comm", name, item.key)
        self._communication.append(span)
        return span

    def first_timeout(self, spans: Sequence[Span]) -> CollectiveTimeout | None:
        """The time-out that ends the run, given the spans of all ranks."""
        if not self._timeouts:
            return None
        first = min(self._timeouts, key=lambda timeout: timeout.time)
        first = replace(first, needed=self.longest[first.of_hosts])
        work = [span for span in spans if span.kind in _WORK]
        return with_busy_rank(first, [*work, *self._communication])


_WORK = ("compile", "load", "compute")


def with_busy_rank(timeout: CollectiveTimeout, spans: Sequence[Span]) -> CollectiveTimeout:
    """Follow the chain of waiting ranks at that time to a rank that works."""
    rank, seen = timeout.waiting_for, {timeout.rank}
    while rank not in seen:
        seen.add(rank)
        now = [s for s in spans if s.rank == rank and s.start <= timeout.time < s.end]
        for span in now:
            if span.kind in _WORK:
                return replace(timeout, waiting_for=rank, busy_with=f"{span.kind} {span.name}")
        waits = [span for span in now if span.kind == "comm"]
        if not waits:
            break
        others = [s for s in spans if s.kind == "comm" and s.key == waits[0].key]
        others = [s for s in others if s.rank != rank]
        if others:
            rank = max(others, key=lambda span: span.start).rank
    return replace(timeout, busy_with="nothing")
