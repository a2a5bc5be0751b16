"""What all reports are printed with."""

from __future__ import annotations

from rich.console import Console

PIPED_WIDTH = 100
"""Columns of output that goes to no terminal."""


def make_console(*, highlight: bool = True) -> Console:
    """A console as wide as the terminal, else :data:`PIPED_WIDTH` columns."""
    console = Console(highlight=highlight)
    return console if console.is_terminal else Console(width=PIPED_WIDTH, highlight=highlight)
