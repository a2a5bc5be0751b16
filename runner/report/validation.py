"""Compare predictions with measured runs, as a table and as plain data."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from runner.report.console import make_table
from runner.timeline import Timeline
from sim.calibration.validation import ValidatedRun, error_summary


def print_validation(console: Console, runs: Sequence[ValidatedRun], title: str) -> None:
    """Print a summary, and one run per row: wall time from process start to the last answer."""
    headers = ["measured\ns", "predicted\ns", "error", "compiles", "predicted"]
    table = make_table(title, ["run"], [*headers, "duplicates", "predicted"])
    for run in runs:
        measured, predicted = run.measured, run.predicted.timeline
        table.add_row(
            Text(run.name),
            f"{measured.wall:.1f}",
            f"{predicted.wall:.1f}",
            f"{100 * run.error:+.1f} %",
            str(measured.kernels_compiled),
            str(predicted.kernels_compiled),
            str(measured.duplicates),
            str(predicted.duplicates),
        )
    console.print(table)
    console.print(error_summary(runs))


def validation_json(runs: Sequence[ValidatedRun], hardware: str) -> dict[str, object]:
    """The table as plain data, with times in seconds and errors as fractions."""
    rows = [
        {
            "run": run.name,
            "measured": _figures(run.measured),
            "predicted": _figures(run.predicted.timeline),
            "error": round(run.error, 4),
        }
        for run in runs
    ]
    return {"version": 1, "hardware": hardware, "runs": rows}


def _figures(timeline: Timeline) -> dict[str, object]:
    return {
        "wall_seconds": round(timeline.wall, 3),
        "up_seconds": round(timeline.up, 3),
        "kernels_compiled": timeline.kernels_compiled,
        "duplicates": timeline.duplicates,
        "phases": {name: round(seconds, 3) for name, seconds in timeline.phases().items()},
    }
