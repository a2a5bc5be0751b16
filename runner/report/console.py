"""The console and the tables that all reports are printed with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import replace

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 100
"""Columns of output that does not go to a terminal."""

_NAME_WIDTH, _SHORTEST_NAME = 16, 4


def make_console(*, highlight: bool = True) -> Console:
    """A console as wide as the terminal, else :data:`PIPED_WIDTH` columns."""
    console = Console(highlight=highlight)
    return console if console.is_terminal else Console(width=PIPED_WIDTH, highlight=highlight)


class ReportTable(Table):
    """A table that fits narrow terminals and loses no letter there.

    Columns that do not wrap keep their cells whole. Where space is short, the columns move closer,
    then the headers of these columns are folded, the longest first, then the names in the others.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = [_width_of(column.cells) for column in self.columns]
        least = [
            max(width, _width_of([column.header]))
            for width, column in zip(cells, self.columns, strict=True)
        ]
        needed = self.__rich_measure__(console, options.update(max_width=10_000)).maximum
        for index, column in enumerate(self.columns):
            if not column.no_wrap and least[index] > _NAME_WIDTH:
                needed -= least[index] - _NAME_WIDTH
                least[index] = _NAME_WIDTH
        if needed <= options.max_width:
            return super().__rich_console__(console, options)
        tight = copy(self)
        tight.padding, tight.pad_edge = (0, 0), False
        borders = len(least) + 1
        over = sum(least) + borders - options.max_width
        whole = [column.no_wrap for column in self.columns]
        for no_wrap, shortest in ((True, cells), (False, [_SHORTEST_NAME] * len(cells))):
            columns = [index for index, its in enumerate(whole) if its is no_wrap]
            over = _narrow(least, columns, shortest, over)
        tight.columns = [
            replace(column, width=width, no_wrap=False, overflow="fold")
            for column, width in zip(self.columns, least, strict=True)
        ]
        return Table.__rich_console__(tight, console, options)


def _width_of(cells: Iterable[object]) -> int:
    return max((cell_len(line) for cell in cells for line in str(cell).splitlines()), default=1)


def _narrow(widths: list[int], columns: Sequence[int], shortest: list[int], over: int) -> int:
    """Take ``over`` off the widths of some columns, the widest first; return what is left over."""
    while over > 0:
        wide = [index for index in columns if widths[index] > max(shortest[index], 1)]
        if not wide:
            break
        widths[max(wide, key=lambda index: widths[index])] -= 1
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
