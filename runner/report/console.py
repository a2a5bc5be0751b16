"""The console and the table style of all reports."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 100
"""Width in columns of output that does not go to a terminal."""


def make_console(*, highlight: bool = True, file: TextIO | None = None) -> Console:
    """A console as wide as the terminal, or :data:`PIPED_WIDTH` columns without one.

    It shows all text literally, since names come from files: no markup, no emoji codes.
    """
    make = partial(Console, highlight=highlight, markup=False, emoji=False, file=file)
    console = make()
    return console if console.is_terminal else make(width=PIPED_WIDTH)


def make_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """Make an empty table in the style of all reports.

    Args:
        title: shown above the table, literally (no markup).
        left: headers of the first columns, which hold names.
        right: headers of the columns after them, which hold numbers.
    """
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE, collapse_padding=True)
    for header in left:
        table.add_column(header, overflow="fold")
    for header in right:
        table.add_column(header, justify="right", overflow="fold")
    return table


def counted(number: int, noun: str) -> str:
    """``1 node``, ``2 nodes`` and so on, for nouns that take an s."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
