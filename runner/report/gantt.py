"""Gantt charts of Timelines as PNG or SVG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import UserError
from runner.report.picture import INK, check_plot, save_picture
from runner.report.timelines import BUSY_KINDS, busy_segments
from runner.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any colour vision, and by lightness in print.
_COLORS = {
    "compile": "#D55E00",
    "load": "#F0C342",
    "compute": "#0072B2",
    "comm": "#56B4E9",
    "wait": "#D4D4D4",
    "setup": "#CC79A7",
}
_BESIDE = "#009E73"


def plot_gantt(path: Path, timelines: Sequence[Timeline]) -> None:
    """Draw a panel per Timeline, all on one time axis in seconds, a row per rank.

    Args:
        path: the file to write; its suffix, one of ``picture.SUFFIXES``, says the format.
        timelines: what to draw, from top to bottom.

    Raises:
        UserError: unknown suffix, no Timelines, no matplotlib, or the file cannot be written.
    """
    check_plot(path)
    if not timelines:
        raise UserError(f"cannot plot to {path}: no timelines")
    save_picture(path, lambda: _figure(timelines))


def _figure(timelines: Sequence[Timeline]) -> Figure:
    # Not pyplot: it would keep the figure and pick a backend for the whole process.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    heights = [
        0.5 + timeline.world_size * min(0.3, max(0.1, 4.0 / timeline.world_size))
        for timeline in timelines
    ]
    layout = ConstrainedLayoutEngine(h_pad=0.08)
    figure = Figure(figsize=(10.0, sum(heights) + 0.9), layout=layout)
    grid = figure.subplots(
        len(timelines), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axes, timeline in zip(grid[:, 0], timelines, strict=True):
        _draw_panel(axes, timeline)
    grid[-1, 0].set_xlim(0, max(timeline.wall for timeline in timelines) * 1.01 or 1)
    grid[-1, 0].set_xlabel("seconds since start")
    _add_legend(figure, timelines)
    return figure


def _draw_panel(axes: Axes, timeline: Timeline) -> None:
    for rank, spans in enumerate(timeline.by_rank()):
        segments = busy_segments(spans)
        for kind in BUSY_KINDS:
            ranges = [(start, end - start) for start, end, it in segments if it == kind]
            axes.broken_barh(ranges, (rank - 0.4, 0.8), facecolors=_COLORS[kind], linewidth=0)
        beside = [(s.start, s.seconds) for s in spans if s.kind == "beside"]
        axes.broken_barh(beside, (rank + 0.12, 0.28), facecolors=_BESIDE, linewidth=0)
        starts = [span.start for span in spans if span.kind == "phase" and span.start > 0]
        axes.vlines(starts, rank - 0.47, rank + 0.47, colors=INK, linewidth=1)
    # A dollar sign in a policy's name would start a formula.
    label = timeline.label.replace("$", r"\$")
    title = (
        f"{label}: {timeline.wall:.2f} s wall, {timeline.kernels_compiled} compiles "
        f"of {timeline.distinct_kernels} kernels"
    )
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylabel("rank")
    axes.set_ylim(timeline.world_size - 0.4, -0.6)
    axes.set_yticks(range(0, timeline.world_size, 1 if timeline.world_size <= 16 else 8))
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#E8E8E8", linewidth=0.6)
    axes.set_axisbelow(True)


def _add_legend(figure: Figure, timelines: Sequence[Timeline]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = [Patch(color=_COLORS[kind], label=kind) for kind in BUSY_KINDS]
    if any(span.kind == "beside" for timeline in timelines for span in timeline.spans):
        handles.append(Patch(color=_BESIDE, label="beside"))
    handles.append(
        Line2D([], [], color=INK, linewidth=0.8, marker="|", linestyle="", label="phase starts")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
