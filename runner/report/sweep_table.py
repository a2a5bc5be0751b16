"""A sweep as a table for the terminal."""

from __future__ import annotations

from rich import box

from runner.report.console import make_console
from runner.report.table import ReportTable
from sim.sweep.points import Result, Sweep, reasons

BEST = 20
"""Points beside the frontier that are shown unless all are asked for."""

_SHOWN_REASONS = 20

_AXES = ("pp", "tp", "ep", "nodes", "cores")
_FIGURES = (
    "start-up\ns",
    "kernels\npresent",
    "cover-\ned %",
    "com-\npiled",
    "dupli-\ncates",
    "compile\nCPU s",
    "time-\nout s",
)


def print_sweep(sweep: Sweep, *, show_all: bool) -> None:
    """Print the points, fastest first, the frontier marked, then why others were skipped."""
    console = make_console(highlight=False)
    console.print(_title(sweep), markup=False)
    if sweep.results:
        shown = list(sweep.results) if show_all else shown_results(sweep)
        console.print(sweep_table(sweep, shown))
        for line in _notes(sweep, len(sweep.results) - len(shown)):
            console.print(line, markup=False)
    for line in skipped_lines(sweep):
        print(line)


def shown_results(sweep: Sweep, best: int = BEST) -> list[Result]:
    """The frontier and the ``best`` fastest of the others, fastest first."""
    shown, left = [], best
    for result in sweep.results:
        on = result.point in sweep.frontier
        if on or left > 0:
            shown.append(result)
            left -= not on
    return shown


def sweep_table(sweep: Sweep, results: list[Result]) -> ReportTable:
    """Tabulate points, one a row; those on the frontier have a ``*``.

    The percentage covered is rounded down, so that 100.0 is all.
    """
    # Gaps of one column: a policy's whole name and every axis then fit on 100.
    table = ReportTable(box=box.SIMPLE, padding=0, pad_edge=False)
    table.add_column("", min_width=1, no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for header in (*_AXES, *_FIGURES):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        point = result.point
        table.add_row(
            "*" if point in sweep.frontier else "",
            point.policy.value,
            *map(str, (point.pp, point.tp)),
            "on" if point.ep else "off",
            *map(str, (point.nodes, point.cores)),
            f"{result.up_seconds:.2f}",
            f"{result.present}/{result.planned}",
            f"{int(1000 * result.coverage) / 10:.1f}",
            *map(str, (result.kernels_compiled, result.duplicates)),
            f"{result.cpu_seconds:.1f}",
            "-" if result.timeout_seconds is None else f"{result.timeout_seconds:.0f}",
        )
    return table


def skipped_lines(sweep: Sweep) -> list[str]:
    """One line for each distinct reason."""
    lines = [f"skipped {count}: {reason}" for reason, count in reasons(sweep.skipped)]
    more = len(lines) - _SHOWN_REASONS
    return (
        lines if more <= 0 else [*lines[:_SHOWN_REASONS], f"other reasons: {more}, all in the JSON"]
    )


def _title(sweep: Sweep) -> str:
    settings = sweep.settings
    counts = [f"{len(sweep.results)} simulated"]
    counts += [f"{len(sweep.skipped)} skipped"] * bool(sweep.skipped)
    counts += [f"{len(sweep.unfinished)} not reached"] * bool(sweep.unfinished)
    return (
        f"{settings['model']}, {settings['layers']} layers, {settings['hardware']}, "
        f"link {settings['link']}; cold caches, forwards of up to {settings['max_tokens']} tokens\n"
        f"requests of batch sizes {','.join(map(str, settings['batch_sizes']))}; "
        f"points: {', '.join(counts)}"
    )


def _notes(sweep: Sweep, hidden: int) -> list[str]:
    notes = ["* frontier: no other point starts as fast and covers as much, or better"]
    lost = sum(result.timeout_seconds is not None for result in sweep.results)
    if lost:
        notes.append(f"time-out: the watchdog ends {lost} of these runs; none is on the frontier")
    if hidden:
        notes.append(f"slower points not shown: {hidden}; --all shows them")
    return notes
