"""Two layers of a forward as a Gantt picture: the GPU and its link, by each strategy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runner.report.picture import INK, save_picture
from sim.overlap.compare import Comparison, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito's palette: the halves differ in lightness too.
_COLORS = {0: "#0072B2", 1: "#E69F00"}
_WAIT = "#D4D4D4"
_WIDTH_INCHES, _PANEL_INCHES = 11.0, 1.15
_SHORT = {
    "comm_prepare_attn": "prep",
    "attn_prepare": "prepare",
    "attn_core": "core",
    "comm_prepare_mlp": "prep",
    "select_experts": "select",
    "dispatch_a": "da",
    "dispatch_b": "db",
    "shared_experts": "shared",
    "combine_a": "ca",
    "combine_b": "cb",
    "output": "out",
    "comm_postprocess_layer": "post",
    "all_to_all tokens": "tokens",
    "all_gather routing": "routing",
    "all_to_all results": "results",
    "all_gather tokens": "tokens",
    "reduce_scatter results": "results",
    "all_gather attention input": "gather",
    "reduce_scatter attention output": "scatter",
}
_LETTERS_PER_INCH = 19.0


def plot_turns(path: Path, comparison: Comparison, title: str) -> None:
    """Draw a panel for each strategy, all on one scale, from one moment of a layer on.

    Raises:
        UserError: unknown suffix, no matplotlib, or the file cannot be written.
    """
    save_picture(path, lambda: _figure(comparison, title))


def _figure(comparison: Comparison, title: str) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    runs = [run for run in comparison.runs if run.strategy is not None]
    shown = [_two_layers(run, len(comparison.layers)) for run in runs]
    longest = max(end - start for start, end in shown)
    height = _PANEL_INCHES * len(runs) + 1.0
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout=ConstrainedLayoutEngine(h_pad=0.06))
    grid = figure.subplots(len(runs), sharex=True, squeeze=False)
    for axes, run, (start, end) in zip(grid[:, 0], runs, shown, strict=True):
        _draw(axes, run, start, end, longest)
    grid[-1, 0].set_xlim(0, 1e6 * longest)
    grid[-1, 0].set_xlabel(f"microseconds; two layers of {len(comparison.layers)}. {title}")
    handles = [
        Patch(color=_COLORS[0], label="first half"),
        Patch(color=_COLORS[1], label="second half"),
        Patch(color=_WAIT, label="the GPU waits"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _two_layers(run: Run, layers: int) -> tuple[float, float]:
    """From where the first half begins a layer in the middle until it begins the next but one."""
    starts: dict[int, float] = {}
    for piece in run.turns.pieces:
        if piece.half == 0 and piece.lane == "compute":
            starts.setdefault(piece.layer, piece.start)
    middle = max(0, layers // 2 - 1)
    return starts[middle], starts.get(middle + 2, run.turns.seconds)


def _draw(axes: Axes, run: Run, start: float, end: float, longest: float) -> None:
    letters = (_WIDTH_INCHES - 0.6) * _LETTERS_PER_INCH / longest
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
        label = _SHORT.get(piece.name, piece.name)
        if not waits and len(label) <= (right - left) * letters:
            color = "white" if piece.half == 0 else INK
            middle = 1e6 * ((left + right) / 2 - start)
            axes.text(middle, row, label, ha="center", va="center", fontsize=6.5, color=color)
    seconds, exposed = run.turns.seconds, run.turns.exposed
    title = f"{run.name}: {1e3 * seconds:.2f} ms a step, {1e3 * exposed:.2f} ms exposed"
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_yticks([0.0, 1.0], ["link", "GPU"])
    axes.set_ylim(-0.5, 1.5)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
