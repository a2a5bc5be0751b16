"""A wait beyond the limit, and who is to blame for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from runner.timeline import Span


@dataclass(frozen=True)
class CollectiveTimeout:
    """A wait beyond the limit: the run would have died at ``time``.

    Attributes:
        time: seconds since the origin.
        rank: the rank that gave up waiting.
        operation: what it waited in.
        waiting_for: the rank that was working while it waited, its own awaited peer or the one
            that this in turn waited for.
        busy_with: what that rank was doing at ``time``.
        needed: the smallest limit that the whole run would have survived, in seconds: its longest
            wait of the kind, which need not be this one.
        of_hosts: whether it is a wait of hosts for each other, which has a limit of its own.
    """

    time: float
    rank: int
    operation: str
    waiting_for: int
    busy_with: str
    needed: float
    of_hosts: bool = False


WORK = ("compile", "load", "compute")
"""Kinds of span in which a rank works."""


def with_culprit(timeout: CollectiveTimeout, spans: Sequence[Span]) -> CollectiveTimeout:
    """Follow who waits for whom at that time to a rank that works, and say at what."""
    rank, seen = timeout.waiting_for, {timeout.rank}
    while rank not in seen:
        seen.add(rank)
        at = [s for s in spans if s.rank == rank and s.start <= timeout.time < s.end]
        working = [s for s in at if s.kind in WORK]
        if working:
            doing = f"{working[0].kind} {working[0].name}"
            return replace(timeout, waiting_for=rank, busy_with=doing)
        waits = [s for s in at if s.kind == "comm"]
        if not waits:
            break
        rank = _last_to_come(waits[0], spans)
    return replace(timeout, busy_with="nothing")


def _last_to_come(wait: Span, spans: Sequence[Span]) -> int:
    """Who arrived last at a collective, or sent what was received."""
    among = [s for s in spans if s.kind == "comm" and s.key == wait.key and s.rank != wait.rank]
    return max(among, key=lambda s: s.start).rank if among else wait.rank
