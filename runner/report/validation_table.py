"""Predictions against measurements as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from runner.report.console import make_table
from runner.timeline import Timeline
from sim.calibration.validation import Judged


def judged_table(judged: Sequence[Judged], title: str) -> Table:
    """One run a row: start-up from process start to the last answer, compiles and duplicates."""
    headers = [
        "measured\ns",
        "predicted\ns",
        "error",
        "compiles",
        "predicted",
        "duplicates",
        "predicted",
    ]
    table = make_table(title, ["run"], headers)
    for item in judged:
        measured, predicted = item.measured, item.predicted.timeline
        table.add_row(
            Text(item.name),
            f"{measured.wall:.1f}",
            f"{predicted.wall:.1f}",
            f"{100 * item.error:+.1f} %",
            str(measured.kernels_compiled),
            str(predicted.kernels_compiled),
            str(measured.duplicates),
            str(predicted.duplicates),
        )
    return table


def judged_json(judged: Sequence[Judged], hardware: str) -> dict[str, Any]:
    """The same as plain data; times in seconds, errors as fractions."""
    runs = [
        {
            "run": item.name,
            "measured": _figures(item.measured),
            "predicted": _figures(item.predicted.timeline),
            "error": round(item.error, 4),
        }
        for item in judged
    ]
    return {"version": 1, "hardware": hardware, "runs": runs}


def _figures(timeline: Timeline) -> dict[str, Any]:
    return {
        "wall_seconds": round(timeline.wall, 3),
        "up_seconds": round(timeline.up, 3),
        "kernels_compiled": timeline.kernels_compiled,
        "duplicates": timeline.duplicates,
        "phases": {name: round(seconds, 3) for name, seconds in timeline.phases().items()},
    }
