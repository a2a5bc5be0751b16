"""Gantt charts of Timelines as PNG or SVG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.report.picture import INK, add_legend, draw_panels, save_picture
from runner.report.timelines import BUSY_KINDS, busy_segments
from runner.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinguishable with any colour vision, and by lightness in print.
_COLORS = {
    "compile": "#D55E00",
    "load": "#F0C342",
    "compute": "#0072B2",
    "comm": "#56B4E9",
    "wait": "#D4D4D4",
    "setup": "#CC79A7",
    "beside": "#009E73",
}


def plot_gantt(path: Path, timelines: Sequence[Timeline]) -> None:
    """Draw one panel per Timeline with one row per rank, all on one time axis in seconds.

    Raises:
        UserError: unknown suffix, no matplotlib, or an unwritable file.
    """
    save_picture(path, lambda: _figure(timelines))


def _figure(timelines: Sequence[Timeline]) -> Figure:
    from matplotlib.lines import Line2D

    sizes = [timeline.world_size for timeline in timelines]
    figure, panels = draw_panels(
        [
            f"{timeline.label}: {timeline.wall:.2f} s wall, {timeline.kernels_compiled} compiles "
            f"of {timeline.distinct_kernels} kernels"
            for timeline in timelines
        ],
        [0.5 + min(0.3 * size, max(0.1 * size, 4.0)) for size in sizes],
        "seconds since start",
        max(timeline.wall for timeline in timelines) * 1.01 or 1,
    )
    for axes, timeline in zip(panels, timelines, strict=True):
        _draw_panel(axes, timeline)
    used = {span.kind for timeline in timelines for span in timeline.spans}
    colors = {k: color for k, color in _COLORS.items() if k in BUSY_KINDS or k in used}
    start = Line2D([], [], color=INK, marker="|", linestyle="", label="phase starts")
    add_legend(figure, colors, start)
    return figure


def _draw_panel(axes: Axes, timeline: Timeline) -> None:
    for rank, spans in enumerate(timeline.by_rank()):
        segments = busy_segments(spans)
        for kind in BUSY_KINDS:
            ranges = [(start, end - start) for start, end, it in segments if it == kind]
            axes.broken_barh(ranges, (rank - 0.4, 0.8), facecolors=_COLORS[kind], linewidth=0)
        beside = [(s.start, s.seconds) for s in spans if s.kind == "beside"]
        axes.broken_barh(beside, (rank + 0.12, 0.28), facecolors=_COLORS["beside"], linewidth=0)
        starts = [span.start for span in spans if span.kind == "phase" and span.start > 0]
        axes.vlines(starts, rank - 0.47, rank + 0.47, colors=INK, linewidth=1)
    axes.set_ylabel("rank")
    axes.set_ylim(timeline.world_size - 0.4, -0.6)
    axes.set_yticks(range(0, timeline.world_size, 1 if timeline.world_size <= 16 else 8))
    axes.tick_params(axis="x", labelbottom=True)
    axes.grid(axis="x", color="#E8E8E8", linewidth=0.6)
    axes.set_axisbelow(True)
