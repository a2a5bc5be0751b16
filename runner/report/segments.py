"""Exclusive segments of a rank's time, and other figures that several reports share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from runner.timeline import KINDS, RankTotals, Span, Timeline

BUSY_KINDS = tuple(kind for kind in KINDS if kind not in ("phase", "beside"))
"""Kinds that take up a rank's time, in the order in which one hides another where spans overlap."""

Segment = tuple[float, float, str]
"""Start and end in seconds, and the kind."""


def busy_segments(spans: Iterable[Span]) -> list[Segment]:
    """Cut one rank's time so that every moment counts for one kind only.

    Spans may overlap (compiles that run in parallel), so their sum can exceed the time that went
    by; segments never overlap. Neighbours of the same kind are joined; gaps stay gaps.

    Args:
        spans: spans of one rank in any order; phases, and what goes on beside, are left out.

    Returns:
        Segments in order of time.
    """
    edges = sorted(_edges(spans), key=lambda edge: edge[0])
    active: Counter[str] = Counter()
    segments: list[Segment] = []
    for (time, kind, step), (until, _, _) in pairwise(edges):
        active[kind] += step
        top = next((kind for kind in BUSY_KINDS if active[kind]), None)
        if top is None or until <= time:
            continue
        if segments and segments[-1][1:] == (time, top):
            segments[-1] = (segments[-1][0], until, top)
        else:
            segments.append((time, until, top))
    return segments


def _edges(spans: Iterable[Span]) -> list[tuple[float, str, int]]:
    edges = []
    for span in spans:
        if span.kind in BUSY_KINDS and span.end > span.start:
            edges += [(span.start, span.kind, 1), (span.end, span.kind, -1)]
    return edges


def spans_by_rank(timeline: Timeline) -> list[list[Span]]:
    """Spans of every rank, in one pass over the Timeline."""
    ranks: list[list[Span]] = [[] for _ in range(timeline.world_size)]
    for span in timeline.spans:
        ranks[span.rank].append(span)
    return ranks


def critical_rank(timeline: Timeline) -> RankTotals:
    """Totals of the rank that finishes last; the lowest such rank if several do.

    Raises:
        ValueError: the Timeline has no ranks.
    """
    return max(timeline.totals(), key=lambda totals: totals.total)


def label_of(timeline: Timeline) -> str:
    """What a report calls a Timeline: its policy and source."""
    return f"{timeline.policy} ({timeline.source})"
