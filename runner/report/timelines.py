"""Tables and bars of Timelines for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from rich.table import Table
from rich.text import Text

from runner.report.console import make_table
from runner.timeline import KINDS, RankTotals, Span, Timeline

BUSY_KINDS = tuple(kind for kind in KINDS if kind not in ("phase", "beside"))
"""Kinds that take up a rank's time; where spans overlap, the first of these kinds counts."""

Segment = tuple[float, float, str]
"""Start and end in seconds, and the kind."""

# The characters alone distinguish the kinds, since logs and pipes have no colours.
_CELLS = {
    "compile": ("#", "bold red"),
    "load": ("o", "yellow"),
    "compute": ("=", "green"),
    "comm": ("~", "cyan"),
    "wait": (".", "bright_black"),
    "setup": ("-", "blue"),
    "idle": ("_", "bright_black"),
}


def busy_segments(spans: Iterable[Span]) -> list[Segment]:
    """Cut one rank's time into segments, in order, so that each moment counts for one kind only.

    Spans can overlap (compiles that run in parallel), so their sum can exceed the elapsed time;
    segments never overlap. Neighbours of the same kind are joined; gaps stay gaps.
    """
    edges: list[tuple[float, str, int]] = []
    for span in spans:
        if span.kind in BUSY_KINDS and span.end > span.start:
            edges += [(span.start, span.kind, 1), (span.end, span.kind, -1)]
    active: Counter[str] = Counter()
    segments: list[Segment] = []
    for (time, kind, step), (until, _, _) in pairwise(sorted(edges, key=lambda edge: edge[0])):
        active[kind] += step
        top = next((kind for kind in BUSY_KINDS if active[kind]), None)
        if top is None or until <= time:
            continue
        if segments and segments[-1][1:] == (time, top):
            segments[-1] = (segments[-1][0], until, top)
        else:
            segments.append((time, until, top))
    return segments


def critical_rank(timeline: Timeline) -> RankTotals:
    """Totals of the rank that finishes last; the lowest rank in a tie."""
    return max(timeline.totals(), key=lambda totals: totals.total)


def timeline_table(timeline: Timeline) -> Table:
    """Tabulate what every rank did: seconds by kind and in total, and the kernels it compiled.

    Seconds are sums of spans: if a rank's compiles overlap, they can exceed its total.
    """
    headers = ["rank", *BUSY_KINDS, "total", "kernels"]
    title = f"{timeline.label}: wall {timeline.wall:.2f} s, seconds by rank"
    table = make_table(title, [], headers)
    for totals in timeline.totals():
        cells = [f"{getattr(totals, kind):.2f}" for kind in (*BUSY_KINDS, "total")]
        table.add_row(str(totals.rank), *cells, str(totals.kernels_compiled))
    return table


def policy_table(timelines: Sequence[Timeline]) -> Table:
    """Tabulate policies, one per row: wall seconds, compiles and their sum, the last rank to end.

    With more than one Timeline, the last column compares the wall with the first Timeline's:
    ``-62 %`` is 62 % less time.
    """
    headers = ["wall s", "kernels\ncompiled", "distinct", "dupli-\ncates"]
    headers += ["compile\nsum s", "last\nrank"]
    several = len(timelines) > 1
    table = make_table("Policies", ["policy", "source"], headers + ["vs\nfirst"] * several)
    for index, timeline in enumerate(timelines):
        cells = [
            f"{timeline.wall:.2f}",
            str(timeline.kernels_compiled),
            str(timeline.distinct_kernels),
            str(timeline.duplicates),
            f"{timeline.compile_seconds:.2f}",
            str(critical_rank(timeline).rank),
        ]
        if several:
            cells.append(_change(timeline.wall, timelines[0].wall) if index else "-")
        table.add_row(Text(timeline.policy), Text(timeline.source), *cells)
    return table


def _change(wall: float, first: float) -> str:
    if first == 0:
        return "-"
    percent = round(100 * (wall - first) / first)
    return f"{percent:+d} %" if percent else "0 %"


def phase_summary(timeline: Timeline) -> Table:
    """Tabulate where the last rank to finish spent its time: seconds and share by kind.

    Where its spans overlap, each moment counts once, for the kind that comes first in the table,
    so that the rows add up to the rank's total. ``other`` is time outside all spans.
    """
    critical = critical_rank(timeline)
    seconds = dict.fromkeys((*BUSY_KINDS, "other"), 0.0)
    for start, end, kind in busy_segments(timeline.by_rank()[critical.rank]):
        seconds[kind] += end - start
    seconds["other"] = max(critical.total - sum(seconds.values()), 0.0)
    title = f"{timeline.label}\nends last: rank {critical.rank}, {critical.total:.2f} s"
    table = make_table(title, ["kind"], ["seconds", "share"])
    for kind, value in seconds.items():
        share = f"{100 * value / critical.total:.1f} %" if critical.total else "-"
        table.add_row(kind, f"{value:.2f}", share)
    return table


def rank_bars(timeline: Timeline, scale: float, width: int = 60) -> Text:
    """Draw one bar per rank from left to right; each cell shows the kind that dominates its time.

    ``idle`` is time outside all spans before the rank's end; after its end the bar is blank.

    Args:
        timeline: the Timeline to draw.
        scale: seconds that ``width`` columns stand for, at least the wall.
        width: columns of the longest bar.
    """
    step = scale / width
    digits = len(str(timeline.world_size - 1))
    text = Text()
    for rank, spans in enumerate(timeline.by_rank()):
        total = max((span.end for span in spans), default=0.0)
        kinds = _dominant_kinds(busy_segments(spans), total, step, width)
        text.append(f"rank {rank:>{digits}} |")
        for kind in kinds:
            text.append(*_CELLS[kind])
        text.append(f"{'':{width - len(kinds)}}| {total:7.2f} s\n")
    for kind, (cell, style) in _CELLS.items():
        text.append(cell, style).append(f" {kind}  ")
    return text.append(f"(1 column = {step:.3g} s)")


def _dominant_kinds(
    segments: Iterable[Segment], total: float, step: float, width: int
) -> list[str]:
    """The kind that takes up most of each cell of ``step`` seconds, up to the rank's end."""
    if total <= 0 or step <= 0:
        return []
    # A cell that the rank's end touches only because of rounding does not count.
    cells = min(width, int(total / step - 1e-9) + 1)
    shares = [dict.fromkeys(BUSY_KINDS, 0.0) for _ in range(cells)]
    for start, end, kind in segments:
        for cell in range(int(start / step), min(cells, int(end / step) + 1)):
            shares[cell][kind] += max(min(end, (cell + 1) * step) - max(start, cell * step), 0.0)
    kinds = []
    for cell, share in enumerate(shares):
        idle = min(step, total - cell * step) - sum(share.values())
        kind = max(share, key=lambda kind: share[kind])
        kinds.append(kind if share[kind] >= idle else "idle")
    return kinds
