"""Finding the busy rank behind a wait that timed out."""

from __future__ import annotations

from runner.timeline import Span
from sim.engine.timeout_diagnosis import CollectiveTimeout, with_busy_rank


def lost(waiting_for: int, rank: int = 0, time: float = 10.0) -> CollectiveTimeout:
    return CollectiveTimeout(time, rank, "recv x", waiting_for, "", 12.0)


def busy_rank(spans: list[Span], timeout: CollectiveTimeout) -> tuple[int, str]:
    found = with_busy_rank(timeout, spans)
    assert (found.time, found.rank, found.operation, found.needed) == (
        timeout.time,
        timeout.rank,
        timeout.operation,
        timeout.needed,
    )
    return found.waiting_for, found.busy_with


def test_awaited_rank_is_named_with_its_current_work() -> None:
    spans = [
        Span(1, 0, 8, "compile", "early"),
        Span(1, 8, 12, "compile", "gemm", "k"),
        Span(1, 12, 13, "load", "gemm"),
        Span(1, 0, 20, "phase", "requests"),
        Span(2, 8, 12, "compile", "other"),
    ]
    assert busy_rank(spans, lost(1)) == (1, "compile gemm")
    assert busy_rank(spans, lost(1, time=12)) == (1, "load gemm")


def test_chain_of_waits_is_followed_to_a_busy_rank() -> None:
    """0 waits for 1, 1 for 2 in a collective, 2 for a message from 3, which is computing."""
    spans = [
        Span(1, 2, 14, "comm", "all_reduce x", "1,2 #1"),
        Span(2, 13, 14, "comm", "all_reduce x", "1,2 #1"),
        Span(2, 3, 13, "comm", "recv y", "3>2 #1"),
        Span(3, 11, 11, "comm", "send y", "3>2 #1"),
        Span(3, 0, 11, "compute", "compute"),
    ]
    assert busy_rank(spans, lost(1)) == (3, "compute compute")


def test_last_rank_to_join_a_collective_is_followed() -> None:
    spans = [
        Span(1, 2, 14, "comm", "all_reduce x", "1,2,3 #1"),
        Span(2, 11, 14, "comm", "all_reduce x", "1,2,3 #1"),
        Span(3, 12, 14, "comm", "all_reduce x", "1,2,3 #1"),
        Span(2, 0, 11, "load", "gemm"),
        Span(3, 0, 12, "compile", "gemm", "k"),
    ]
    assert busy_rank(spans, lost(1)) == (3, "compile gemm")


def test_idle_rank_is_busy_with_nothing() -> None:
    assert busy_rank([Span(1, 0, 9, "compute", "compute")], lost(1)) == (1, "nothing")
    assert busy_rank([], lost(2)) == (2, "nothing")


def test_cycle_of_waits_ends_the_search() -> None:
    spans = [
        Span(1, 2, 14, "comm", "all_reduce x", "1,2 #1"),
        Span(2, 2, 14, "comm", "all_reduce x", "1,2 #1"),
    ]
    assert busy_rank(spans, lost(1))[1] == "nothing"
    assert busy_rank([Span(1, 2, 14, "comm", "all_reduce x", "k")], lost(1)) == (1, "nothing")
