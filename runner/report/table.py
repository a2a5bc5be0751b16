"""Tables and bars of Timelines for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from runner.report.segments import (
    BUSY_KINDS,
    Segment,
    busy_segments,
    critical_rank,
    label_of,
    spans_by_rank,
)
from runner.timeline import Timeline

# The characters alone tell the kinds apart: logs and pipes have no colours.
_CELLS = {
    "compile": ("#", "bold red"),
    "load": ("o", "yellow"),
    "compute": ("=", "green"),
    "comm": ("~", "cyan"),
    "wait": (".", "bright_black"),
    "setup": ("-", "blue"),
    "idle": ("_", "bright_black"),
}


class ReportTable(Table):
    """A table that fits on narrow terminals and loses no letter there.

    Columns that do not wrap keep their cells whole: columns move closer, then headers of these are
    folded, the longest first, then the names in other columns.
    """

    _NAMES, _SHORTEST = 16, 4

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        before = [(column.width, column.no_wrap) for column in self.columns]
        apart, at_edge = self.padding, self.pad_edge
        self._fit(console, options)
        rendered = [*super().__rich_console__(console, options)]
        for column, (width, no_wrap) in zip(self.columns, before, strict=True):
            column.width, column.no_wrap = width, no_wrap
        self.padding, self.pad_edge = apart, at_edge
        return iter(rendered)

    def _fit(self, console: Console, options: ConsoleOptions) -> None:
        """Give the columns widths, where they would otherwise be cut."""
        cells = [_width_of(column.cells) for column in self.columns]
        needed = [
            max(width, _width_of([column.header]))
            for width, column in zip(cells, self.columns, strict=True)
        ]
        whole = [column.no_wrap for column in self.columns]
        least = [
            width if is_whole else min(width, self._NAMES)
            for width, is_whole in zip(needed, whole, strict=True)
        ]
        if self._frame(console, options, needed) + sum(least) <= options.max_width:
            return
        self.padding, self.pad_edge = (0, 0), False
        over = self._frame(console, options, needed) + sum(least) - options.max_width
        headers = {i: width for i, width in enumerate(cells) if whole[i]}
        names = {i: self._SHORTEST for i in range(len(cells)) if not whole[i]}
        for ends in (headers, names):
            over = _narrow(least, ends, over)
        for column, width in zip(self.columns, least, strict=True):
            column.width, column.no_wrap, column.overflow = width, False, "fold"

    def _frame(self, console: Console, options: ConsoleOptions, widths: Sequence[int]) -> int:
        """Columns of the terminal beside those that cells need."""
        for column, width in zip(self.columns, widths, strict=True):
            column.width = width
        wide = options.update(max_width=sum(widths) + 100 * len(widths))
        found = self.__rich_measure__(console, wide).maximum - sum(widths)
        for column in self.columns:
            column.width = None
        return found


def _width_of(cells: Iterable[object]) -> int:
    return max((cell_len(line) for cell in cells for line in str(cell).splitlines()), default=1)


def _narrow(widths: list[int], ends: dict[int, int], over: int) -> int:
    """Take ``over`` off ``widths``, each time off the widest above its end; what is left over."""
    while over > 0:
        wide = [i for i, end in ends.items() if widths[i] > max(end, 1)]
        if not wide:
            break
        widths[max(wide, key=lambda i: widths[i])] -= 1
        over -= 1
    return over


def make_table(title: str, left: Sequence[str], right: Sequence[str]) -> ReportTable:
    """Make an empty table in the style of all reports.

    Args:
        title: shown above the table, literally (no markup).
        left: headers of the first columns, which hold names.
        right: headers of the columns after them, which hold numbers.
    """
    table = ReportTable(
        title=Text(title), title_justify="left", box=box.SIMPLE, collapse_padding=True
    )
    for header in left:
        table.add_column(header, overflow="fold")
    for header in right:
        # Where the terminal is narrow, names and headers wrap and numbers stay whole.
        table.add_column(header, justify="right", no_wrap=True)
    return table


def timeline_table(timeline: Timeline) -> Table:
    """Tabulate what every rank did: seconds by kind, in all, and the kernels it compiled.

    Seconds are sums of spans: where compiles of a rank overlap, they can exceed its total.
    """
    headers = ["rank", *BUSY_KINDS, "total", "kernels"]
    title = f"{label_of(timeline)}: wall {timeline.wall:.2f} s, seconds by rank"
    table = make_table(title, [], headers)
    for totals in timeline.totals():
        seconds = [getattr(totals, kind) for kind in (*BUSY_KINDS, "total")]
        cells = [f"{value:.2f}" for value in seconds]
        table.add_row(str(totals.rank), *cells, str(totals.kernels_compiled))
    return table


def policy_table(timelines: Sequence[Timeline]) -> Table:
    """Tabulate policies, one a row: wall seconds, compiles and their sum, the last rank to end.

    With more than one Timeline, the last column says how the wall changed against the first:
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
    """Tabulate what the time went to on the rank that finishes last: seconds and share by kind.

    Where spans of the rank overlap, each moment counts once, for the first of the kinds in
    the table's order, so that the rows add up to the rank's total. ``other`` is time that no
    span accounts for.
    """
    critical = critical_rank(timeline)
    seconds = dict.fromkeys((*BUSY_KINDS, "other"), 0.0)
    for start, end, kind in busy_segments(timeline.of_rank(critical.rank)):
        seconds[kind] += end - start
    seconds["other"] = max(critical.total - sum(seconds.values()), 0.0)
    title = f"{label_of(timeline)}\nends last: rank {critical.rank}, {critical.total:.2f} s"
    table = make_table(title, ["kind"], ["seconds", "share"])
    for kind, value in seconds.items():
        share = f"{100 * value / critical.total:.1f} %" if critical.total else "-"
        table.add_row(kind, f"{value:.2f}", share)
    return table


def rank_bars(timeline: Timeline, width: int = 60, scale_seconds: float | None = None) -> Text:
    """Draw one bar a rank, time from left to right, each cell the kind that dominates its slice.

    ``idle`` is time before the rank's end that no span accounts for; after its end the bar is
    blank. The characters differ as well as the colours.

    Args:
        timeline: what to draw.
        width: columns of the longest bar.
        scale_seconds: time that ``width`` columns stand for, so that several Timelines can be
            drawn on one scale; by default the Timeline's wall.

    Raises:
        ValueError: ``width`` is below 1, or ``scale_seconds`` is less than the wall.
    """
    scale = timeline.wall if scale_seconds is None else scale_seconds
    if width < 1 or scale < timeline.wall:
        raise ValueError(
            f"width={width} must be at least 1 and scale_seconds={scale} at least the wall, "
            f"{timeline.wall}"
        )
    step = scale / width
    digits = len(str(timeline.world_size - 1))
    text = Text()
    for rank, spans in enumerate(spans_by_rank(timeline)):
        total = max((span.end for span in spans), default=0.0)
        kinds = _dominant_kinds(busy_segments(spans), total, step, width)
        text.append(f"rank {rank:>{digits}} |")
        for kind in kinds:
            text.append(*_CELLS[kind])
        text.append(f"{'':{width - len(kinds)}}| {total:7.2f} s\n")
    return text.append_text(_legend(step))


def _dominant_kinds(
    segments: Iterable[Segment], total: float, step: float, width: int
) -> list[str]:
    """The kind that takes up most of each cell of ``step`` seconds, up to the rank's end."""
    if total <= 0 or step <= 0:
        return []
    # Cells that the rank's end only touches because of rounding are not its own.
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


def _legend(step: float) -> Text:
    text = Text()
    for kind, (cell, style) in _CELLS.items():
        text.append(cell, style).append(f" {kind}  ")
    return text.append(f"(1 column = {step:.3g} s)")
