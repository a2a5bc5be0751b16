"""Whom a wait that is too long was for."""

from __future__ import annotations

from runner.timeline import Span
from sim.engine.timeout_diagnosis import CollectiveTimeout, with_culprit


def lost(waiting_for: int, rank: int = 0, time: float = 10.0) -> CollectiveTimeout:
    return CollectiveTimeout(time, rank, "recv x", waiting_for, "", 12.0)


def blamed(spans: list[Span], timeout: CollectiveTimeout) -> tuple[int, str]:
    found = with_culprit(timeout, spans)
    assert (found.time, found.rank, found.operation, found.needed) == (
        timeout.time,
        timeout.rank,
        timeout.operation,
        timeout.needed,
    )
    return found.waiting_for, found.busy_with


def test_the_awaited_rank_is_to_blame_where_it_works() -> None:
    spans = [
        Span(1, 0, 8, "compile", "early"),
        Span(1, 8, 12, "compile", "gemm", "k"),
        Span(1, 12, 13, "load", "gemm"),
        Span(1, 0, 20, "phase", "requests"),
        Span(2, 8, 12, "compile", "other"),
    ]
    assert blamed(spans, lost(1)) == (1, "compile gemm")
    assert blamed(spans, lost(1, time=12)) == (1, "load gemm")


def test_a_chain_of_waits_is_followed_to_who_works() -> None:
    """Rank 0 waits for 1, which is in a collective that 2 is late for, which waits for 3."""
    spans = [
        Span(1, 2, 14, "comm", "all_reduce x", "1,2 #1"),
        Span(2, 13, 14, "comm", "all_reduce x", "1,2 #1"),
        Span(2, 3, 13, "comm", "recv y", "3>2 #1"),
        Span(3, 11, 11, "comm", "send y", "3>2 #1"),
        Span(3, 0, 11, "compute", "compute"),
    ]
    assert blamed(spans, lost(1)) == (3, "compute compute")


def test_the_last_to_come_is_followed() -> None:
    spans = [
        Span(1, 2, 14, "comm", "all_reduce x", "1,2,3 #1"),
        Span(2, 11, 14, "comm", "all_reduce x", "1,2,3 #1"),
        Span(3, 12, 14, "comm", "all_reduce x", "1,2,3 #1"),
        Span(2, 0, 11, "load", "gemm"),
        Span(3, 0, 12, "compile", "gemm", "k"),
    ]
    assert blamed(spans, lost(1)) == (3, "compile gemm")


def test_who_does_nothing_is_doing_nothing() -> None:
    assert blamed([Span(1, 0, 9, "compute", "compute")], lost(1)) == (1, "nothing")
    assert blamed([], lost(2)) == (2, "nothing")


def test_ranks_that_wait_for_each_other_are_not_followed_for_ever() -> None:
    spans = [
        Span(1, 2, 14, "comm", "all_reduce x", "1,2 #1"),
        Span(2, 2, 14, "comm", "all_reduce x", "1,2 #1"),
    ]
    assert blamed(spans, lost(1))[1] == "nothing"
    assert blamed([Span(1, 2, 14, "comm", "all_reduce x", "k")], lost(1)) == (1, "nothing")
