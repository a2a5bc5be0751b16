"""Draw a sweep: start-up time against coverage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.config.warmup import WarmupPolicy
from runner.report.picture import INK, new_figure, save_picture
from sim.sweep.points import AXES, Point, Result, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's palette first; a marker's shape and colour each identify the policy.
_LOOKS = (
    ("o", "#D55E00"),
    ("s", "#0072B2"),
    ("^", "#009E73"),
    ("D", "#CC79A7"),
    ("v", "#E69F00"),
    ("P", "#56B4E9"),
    ("X", "#000000"),
    ("<", "#8C6D1F"),
    (">", "#7F7F7F"),
    ("p", "#4B0092"),
)


def plot_sweep(path: Path, sweep: Sweep) -> None:
    """Draw one or more points: start-up seconds (log scale) against coverage.

    The frontier is a step line, the best coverage for each start-up time; its points are labelled
    with the values that vary. The marker shows the policy; hollow markers are runs that the
    watchdog ends.

    Raises:
        UserError: unknown suffix, no matplotlib, or the file cannot be written.
    """
    save_picture(path, lambda: _figure(sweep))


def _figure(sweep: Sweep) -> Figure:
    points = [vars(result.point) for result in sweep.results]
    varied = [name for name in AXES if len({point[name] for point in points}) > 1]
    figure = new_figure(5.6)
    axes = figure.subplots()
    _draw_axes(axes, sweep)
    settings, fixed = sweep.settings, [name for name in AXES if name not in ("policy", *varied)]
    title = f"{settings['model']}, {settings['layers']} layers, {settings['hardware']}"
    title = f"{title}; {_label(sweep.results[0].point, fixed)}".removesuffix("; ")
    # A dollar sign in a model's name would start a formula.
    axes.set_title(title.replace("$", r"\$"), loc="left", fontsize=10)
    # Slowest first, so that the frontier's markers lie on top.
    for result in reversed(sweep.results):
        marker = _marker(result.point.policy, hollow=result.timeout_seconds is not None)
        marker.set_data([result.up_seconds], [_percent(result)])
        axes.add_line(marker)
    _draw_frontier(axes, sweep, varied)
    _add_legend(figure, sweep.results)
    return figure


def _draw_axes(axes: Axes, sweep: Sweep) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low = min(result.up_seconds for result in sweep.results)
    high = max(result.up_seconds for result in sweep.results)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.25, high * 1.25)
    # With powers of ten alone, a narrow range would have no tick.
    narrow = high < 5 * low
    axes.xaxis.set_major_locator(MaxNLocator(8) if narrow else LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("start-up, seconds")
    axes.set_ylim(-5, 110)  # room for labels
    axes.set_yticks(range(0, 101, 20), [f"{value} %" for value in range(0, 101, 20)])
    axes.set_ylabel("planned kernels present afterwards")
    axes.grid(color="#E8E8E8", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _draw_frontier(axes: Axes, sweep: Sweep, varied: Sequence[str]) -> None:
    """Draw the step line to the right edge and label its corners; equal points share a label."""
    corners = {
        (result.up_seconds, _percent(result)): _label(result.point, varied)
        for result in reversed(sweep.results)
        if result.point in sweep.frontier
    }
    if not corners:
        return
    xs, ys = zip(*sorted(corners), strict=True)
    bottom, right = axes.get_ylim()[0], axes.get_xlim()[1]
    line = ([xs[0], *xs, right], [bottom, *ys, ys[-1]])
    axes.step(*line, where="post", color=INK, linewidth=1.2, zorder=1)
    for corner, label in corners.items():
        axes.annotate(label, corner, (4, 5), textcoords="offset points", fontsize=7.5, color=INK)


def _marker(policy: WarmupPolicy, *, hollow: bool = False) -> Line2D:
    from matplotlib.lines import Line2D

    marker, color = _LOOKS[list(WarmupPolicy).index(policy) % len(_LOOKS)]
    return Line2D(
        [],
        [],
        marker=marker,
        linestyle="",
        markersize=7.0,
        markerfacecolor="none" if hollow else color,
        markeredgecolor=color if hollow else "white",
        markeredgewidth=1.0 if hollow else 0.3,
        zorder=2,
    )


def _add_legend(figure: Figure, results: Sequence[Result]) -> None:
    from matplotlib.lines import Line2D

    used = {result.point.policy for result in results}
    entries = {policy.value: _marker(policy) for policy in WarmupPolicy if policy in used}
    lost = [result.timeout_seconds is not None for result in results]
    if not all(lost):
        entries["frontier"] = Line2D([], [], color=INK, linewidth=1.2)
    if any(lost):
        entries["hollow: ended by the watchdog"] = _marker(WarmupPolicy.NONE, hollow=True)
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=min(len(entries), 6),
        frameon=False,
    )


def _percent(result: Result) -> float:
    return 100 * float(result.coverage)


def _label(point: Point, names: Sequence[str]) -> str:
    """A point's values on some axes."""
    words = [f"{name} {getattr(point, name)}" for name in names if name not in ("policy", "ep")]
    return ", ".join([*words, *["ep"] * (point.ep and "ep" in names)])
