"""Print and write a command's Timelines, real or simulated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from runner.errors import UserError
from runner.files import is_special, write_json
from runner.report.chrome import chrome_trace
from runner.report.console import make_console
from runner.report.gantt import plot_gantt
from runner.report.picture import check_plot
from runner.report.plan_table import coverage_line
from runner.report.timelines import policy_table, rank_bars, timeline_table
from runner.timeline import Timeline, write_timelines


def print_timelines(timelines: Sequence[Timeline]) -> None:
    """Print each Timeline's ranks as a table and as bars on one scale, then a table of policies."""
    console = make_console()
    print_ranks(timelines, console, tables=True)
    console.print(policy_table(timelines))
    for timeline in timelines:
        if timeline.meta.get("coverage"):
            line = coverage_line(timeline.meta["coverage"], timeline.meta["max_tokens"])
            console.print(f"{timeline.policy}: {line}")


def print_ranks(timelines: Sequence[Timeline], console: Console, *, tables: bool) -> None:
    """Print every Timeline's ranks as bars on one scale, each below a table or just its name."""
    scale = max((timeline.wall for timeline in timelines), default=0.0)
    for timeline in timelines:
        console.print(timeline_table(timeline) if tables else timeline.label)
        console.print(rank_bars(timeline, scale))
        console.print()


def check_outputs(
    *,
    timeline: Path | None = None,
    trace: Path | None = None,
    plot: Path | None = None,
    others: Sequence[Path | None] = (),
) -> None:
    """Raise UserError before a long run if its output files cannot be written afterwards."""
    if "-" in (str(trace), str(plot)):
        raise UserError("--trace and --plot need a file: - is only for JSON outputs")
    given = [path for path in (timeline, trace, plot, *others) if path is not None]
    if sum(str(path) == "-" for path in given) > 1:
        raise UserError("only one output can go to standard output (-)")
    files = [path for path in given if str(path) != "-"]
    seen: set[str] = set()
    for path in files:
        _check_writable(path)
        if os.path.realpath(path) in seen and not is_special(path):
            raise UserError(f"{path} is given for two outputs: give each its own file")
        seen.add(os.path.realpath(path))
    if plot is not None:
        check_plot(plot)


def _check_writable(path: Path) -> None:
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: its folder does not exist")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"cannot write {path}: you may not write there; give another file")


def write_reports(
    timelines: Sequence[Timeline],
    *,
    timeline: Path | None,
    trace: Path | None,
    plot: Path | None,
    quiet: bool = False,
) -> None:
    """Write the files that were asked for and say so.

    Args:
        timelines: the Timelines to write.
        timeline: path of the JSON; ``-`` is standard output, which then holds nothing else.
        trace: path of the Chrome trace.
        plot: path of the Gantt picture.
        quiet: whether standard output already holds JSON.
    """
    if timeline is not None:
        write_timelines(timeline, timelines)
    if trace is not None:
        write_json(trace, chrome_trace(timelines))
    if plot is not None:
        plot_gantt(plot, timelines)
    for path in (timeline, trace, plot):
        if path is not None and not quiet and str(timeline) != "-":
            print(f"wrote {path}")
