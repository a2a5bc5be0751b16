"""Gantt picture of two layers of a forward: the GPU and its link, under each strategy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runner.report.picture import INK, add_legend, draw_panels, save_picture
from sim.overlap.compare import Comparison, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From Okabe and Ito's palette; the halves also differ in lightness.
_COLORS = {0: "#0072B2", 1: "#E69F00"}
_WAIT = "#D4D4D4"
_LETTERS = 185.0
"""Letters that fit on the picture's width; names are cut to fit their bars."""


def plot_turns(path: Path, comparison: Comparison, title: str) -> None:
    """Draw one panel per strategy, all on one scale and from the same point of a layer.

    Raises:
        UserError: unknown suffix, no matplotlib, or the file cannot be written.
    """
    save_picture(path, lambda: _figure(comparison, title))


def _figure(comparison: Comparison, title: str) -> Figure:
    runs = [run for run in comparison.runs if run.strategy is not None]
    shown = [_two_layers(run, len(comparison.layers)) for run in runs]
    longest = max(end - start for start, end in shown)
    figure, panels = draw_panels(
        [
            f"{run.name}: {1e3 * run.turns.seconds:.2f} ms a step, "
            f"{1e3 * run.turns.exposed:.2f} ms exposed"
            for run in runs
        ],
        [1.15] * len(runs),
        f"microseconds; two layers of {len(comparison.layers)}. {title}",
        1e6 * longest,
    )
    for axes, run, (start, end) in zip(panels, runs, shown, strict=True):
        _draw(axes, run, start, end, longest)
    colors = {"first half": _COLORS[0], "second half": _COLORS[1], "the GPU waits": _WAIT}
    add_legend(figure, colors)
    return figure


def _two_layers(run: Run, layers: int) -> tuple[float, float]:
    """From when the first half begins a middle layer until it begins the layer after the next."""
    starts: dict[int, float] = {}
    for piece in run.turns.pieces:
        if piece.half == 0 and piece.lane == "compute":
            starts.setdefault(piece.layer, piece.start)
    middle = max(0, layers // 2 - 1)
    return starts[middle], starts.get(middle + 2, run.turns.seconds)


def _draw(axes: Axes, run: Run, start: float, end: float, longest: float) -> None:
    for piece in run.turns.pieces:
        left, right = max(piece.start, start), min(piece.end, end)
        if right <= left or piece.layer < 0:
            continue
        row, waits = 0.0 if piece.lane == "link" else 1.0, piece.lane == "wait"
        axes.broken_barh(
            [(1e6 * (left - start), 1e6 * (right - left))],
            (row - 0.4, 0.8),
            facecolors=_WAIT if waits else _COLORS[piece.half],
            edgecolors="white",
            linewidth=0.4,
        )
        label = piece.name.rpartition(" ")[2]  # "tokens" of "all_to_all tokens"
        label = label[: int((right - left) / longest * _LETTERS)]
        if not waits and len(label) > 1:
            color = "white" if piece.half == 0 else INK
            middle = 1e6 * ((left + right) / 2 - start)
            axes.text(middle, row, label, ha="center", va="center", fontsize=6.5, color=color)
    axes.set_yticks([0.0, 1.0], ["link", "GPU"])
    axes.set_ylim(-0.5, 1.5)
