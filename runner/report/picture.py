"""Pictures as PNG or SVG files."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")

INK = "#333333"
"""Colour of text and lines."""

DPI = 150
"""Pixels an inch of PNG files."""


def check_plot(path: Path) -> None:
    """Raise UserError where nothing can be drawn to ``path``: suffix, matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot plot to {path}: suffix must be one of {', '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise UserError("plotting needs matplotlib: pip install 'deepgemm-coldstart[plot]'")


def save_picture(path: Path, draw: Callable[[], Figure]) -> None:
    """Draw a figure and write it; the same figure makes the same SVG file, byte for byte.

    Args:
        path: the file to write; its suffix says the format.
        draw: makes the figure, under the settings of all our pictures.

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
            figure.savefig(path, format=suffix[1:], dpi=DPI, metadata=metadata)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
