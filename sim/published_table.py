"""Published figures against predictions, as text and as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import Any

from rich.table import Table
from rich.text import Text

from runner.report.console import make_table
from sim.published import Compared, Published, Row, summary


def compared_table(compared: Sequence[Compared]) -> Table:
    """One row each; deviations are from the nearer end of what was reported."""
    headers = ["reported", "predicted", "deviation"]
    table = make_table("Published figures and predictions", ["row", "source", "figure"], headers)
    table.add_column("hardware", no_wrap=True)
    table.pad_edge = False
    for item in compared:
        row = item.row
        assert row.figure is not None
        table.add_row(
            Text(row.id),
            Text(row.thread),
            row.figure.value,
            Text(row.reported),
            _figure_text(item),
            f"{100 * item.deviation:+.1f} %" if item.deviation else "0 %",
            Text(_hardware(item)),
        )
    return table


def _figure_text(item: Compared) -> str:
    """In minutes where the thread tells minutes."""
    figure = item.row.figure
    if figure is None or figure.unit != "s":
        return f"{item.predicted:.0f}"
    if item.row.reported.endswith("min"):
        return f"{item.predicted / 60:.1f} min"
    return f"{item.predicted:.1f} s"


def _hardware(item: Compared) -> str:
    assert item.row.set_up is not None
    return item.row.set_up.hardware + (", estimate" if item.estimate else "")


def why_not_table(rows: Sequence[Row]) -> Table:
    """Rows that cannot be simulated."""
    table = make_table("Not simulated", ["row", "reported", "why not"], [])
    for row in rows:
        table.add_row(Text(row.id), Text(row.reported), Text(row.why_not))
    return table


def assumed_lines(compared: Sequence[Compared], published: Published, width: int) -> Iterator[str]:
    """What was assumed: in all rows, then row by row with the command that it comes to."""
    if published.assumed_everywhere:
        yield "Assumed in every row:"
        for text in published.assumed_everywhere:
            yield from _item(text, width)
    for item in compared:
        row = item.row
        assert row.set_up is not None
        yield ""
        yield from wrap(f"{row.id}: {row.what}", width)
        yield from _item(f"stated: {row.stated}", width)
        for text in row.assumed:
            yield from _item(f"assumed: {text}", width)
        if item.dies:
            yield from _item("the watchdog would end the predicted run", width)
        yield from wrap(
            row.set_up.line,
            width,
            initial_indent="  $ ",
            subsequent_indent="      ",
            break_long_words=False,
            break_on_hyphens=False,
        )


def _item(text: str, width: int) -> list[str]:
    return wrap(
        text, width, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False
    )


def published_json(compared: Sequence[Compared], published: Published) -> dict[str, Any]:
    """The same as plain data; deviations as fractions."""
    total = summary(compared)
    return {
        "version": 1,
        "assumed_everywhere": list(published.assumed_everywhere),
        "rows": [_row_json(item) for item in compared],
        "not_simulated": [
            {
                "id": row.id,
                "source": row.source,
                "what": row.what,
                "reported": row.reported,
                "stated": row.stated,
                "why_not": row.why_not,
            }
            for row in published.rows
            if row.set_up is None
        ],
        "summary": {
            "rows": total.rows,
            "within_range": total.within,
            "rows_in_seconds": total.in_seconds,
            "median_deviation": _rounded(total.median),
            "worst_deviation": _rounded(total.worst),
        },
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _row_json(item: Compared) -> dict[str, Any]:
    row = item.row
    assert row.figure is not None and row.set_up is not None
    return {
        "id": row.id,
        "source": row.source,
        "what": row.what,
        "reported": row.reported,
        "low": row.low,
        "high": row.high,
        "figure": row.figure.value,
        "unit": row.figure.unit,
        "predicted": round(item.predicted, 3),
        "deviation": round(item.deviation, 4),
        "watchdog_ends_it": item.dies,
        "hardware": row.set_up.hardware,
        "estimate": item.estimate,
        "stated": row.stated,
        "assumed": list(row.assumed),
        "command": row.set_up.line,
    }
