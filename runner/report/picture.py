"""Draw and save pictures as PNG or SVG files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import UserError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")

INK = "#333333"
"""Colour of text and of lines."""


def check_plot(path: Path) -> None:
    """Raise UserError if ``path`` has an unknown suffix or matplotlib is missing."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot plot to {path}: suffix must be one of {', '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise UserError("plotting needs matplotlib: pip install 'deepgemm-coldstart[plot]'")


def new_figure(height: float) -> Figure:
    """An empty figure of our width, without pyplot, which would pick a backend for the process."""
    from matplotlib.figure import Figure

    return Figure(figsize=(10.0, height), layout="constrained")


def draw_panels(
    titles: Sequence[str], heights: Sequence[float], xlabel: str, right: float
) -> tuple[Figure, list[Axes]]:
    """A figure with one titled panel of bars per height (inches), all on one x axis."""
    figure = new_figure(sum(heights) + 0.9)
    grid = figure.subplots(
        len(heights), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    panels = list(grid[:, 0])
    for axes, title in zip(panels, titles, strict=True):
        # A dollar sign in a policy's name would start a formula.
        axes.set_title(title.replace("$", r"\$"), loc="left", fontsize=10)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[-1].set_xlim(0, right)
    panels[-1].set_xlabel(xlabel.replace("$", r"\$"))
    return figure, panels


def add_legend(figure: Figure, colors: Mapping[str, str], *others: Artist) -> None:
    """Add a legend below the panels for the bars' colours and for other artists' labels."""
    from matplotlib.patches import Patch

    patches = [Patch(color=color, label=label) for label, color in colors.items()]
    handles = [*patches, *others]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def save_picture(path: Path, draw: Callable[[], Figure]) -> None:
    """Draw a figure with our settings and write it; equal figures give byte-identical SVG.

    Raises:
        UserError: unknown suffix, no matplotlib, or the file cannot be written.
    """
    check_plot(path)
    import matplotlib as mpl

    suffix = path.suffix.lower()
    settings = {"svg.hashsalt": "deepgemm-coldstart", "font.size": 9, "text.color": INK}
    metadata = {"Date": None} if suffix == ".svg" else {}
    with mpl.rc_context(settings):  # type: ignore[arg-type]
        figure = draw()
        try:
            figure.savefig(path, format=suffix[1:], dpi=150, metadata=metadata)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
