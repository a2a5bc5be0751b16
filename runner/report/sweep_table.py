"""A sweep as a table for the terminal, and as plain data."""

from __future__ import annotations

from rich import box
from rich.table import Table

from runner.report.console import make_console
from sim.sweep.points import Point, Result, Sweep, count_reasons

_SHOWN_OTHERS = 20
"""How many points off the frontier are shown by default."""

_SHOWN_REASONS = 20

_HEADERS = (
    *("pp", "tp", "ep", "nodes", "cores"),
    *("start-up\ns", "kernels\npresent", "cover-\ned %", "com-\npiled", "dupli-\ncates"),
    *("compile\nCPU s", "time-\nout s"),
)


def print_sweep(sweep: Sweep, *, show_all: bool) -> None:
    """Print the points, fastest first, with the frontier marked, then why others were skipped."""
    console = make_console(highlight=False)
    for line in _title_lines(sweep):
        console.print(line, markup=False)
    if sweep.results:
        shown = list(sweep.results) if show_all else shown_results(sweep)
        console.print(_table(sweep, shown))
        for line in _notes(sweep, len(sweep.results) - len(shown)):
            console.print(line, markup=False)
    for line in skipped_lines(sweep):
        print(line)


def shown_results(sweep: Sweep) -> list[Result]:
    """The frontier and the 20 fastest of the others, fastest first."""
    others = [result for result in sweep.results if result.point not in sweep.frontier]
    hidden = {result.point for result in others[_SHOWN_OTHERS:]}
    return [result for result in sweep.results if result.point not in hidden]


def _table(sweep: Sweep, results: list[Result]) -> Table:
    """A table with one point per row; those on the frontier have a ``*``.

    The coverage is rounded down, so that 100.0 % means all.
    """
    # With one-column gaps, a policy's whole name and every axis fit into 100 columns.
    table = Table(box=box.SIMPLE, padding=0, pad_edge=False)
    table.add_column("", min_width=1)
    table.add_column("policy", overflow="fold")
    for header in _HEADERS:
        table.add_column(header, justify="right", overflow="fold")
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
    """One line per distinct reason for skipping points."""
    lines = [f"skipped {count}: {reason}" for reason, count in count_reasons(sweep.skipped)]
    more = len(lines) - _SHOWN_REASONS
    return (
        lines if more <= 0 else [*lines[:_SHOWN_REASONS], f"other reasons: {more}, all in the JSON"]
    )


def _title_lines(sweep: Sweep) -> list[str]:
    settings = sweep.settings
    counts = [f"{len(sweep.results)} simulated"]
    counts += [f"{len(sweep.skipped)} skipped"] * bool(sweep.skipped)
    counts += [f"{len(sweep.unfinished)} not reached"] * bool(sweep.unfinished)
    return [
        f"{settings['model']}, {settings['layers']} layers, {settings['hardware']}, "
        f"link {settings['link']}; cold caches, forwards of up to {settings['max_tokens']} tokens",
        f"requests of batch sizes {','.join(map(str, settings['batch_sizes']))}; "
        f"points: {', '.join(counts)}",
    ]


def _notes(sweep: Sweep, hidden: int) -> list[str]:
    notes = ["* frontier: no other point starts as fast and covers as much, or better"]
    lost = sum(result.timeout_seconds is not None for result in sweep.results)
    if lost:
        notes.append(f"time-out: the watchdog ends {lost} of these runs; none is on the frontier")
    if hidden:
        notes.append(f"slower points not shown: {hidden}; --all shows them")
    return notes


def sweep_json(sweep: Sweep) -> dict[str, object]:
    """A sweep as plain data: points simulated (fastest first), skipped, and not reached."""
    return {
        "version": 1,
        "settings": sweep.settings,
        "points": [
            {
                **_point_json(result.point),
                "frontier": result.point in sweep.frontier,
                "up_seconds": result.up_seconds,
                "kernels_present": result.present,
                "kernels_planned": result.planned,
                "coverage": float(result.coverage),
                "kernels_compiled": result.kernels_compiled,
                "duplicates": result.duplicates,
                "compile_cpu_seconds": result.cpu_seconds,
                "timeout_seconds": result.timeout_seconds,
            }
            for result in sweep.results
        ],
        "skipped": [{**_point_json(item.point), "reason": item.reason} for item in sweep.skipped],
        "unfinished": [_point_json(point) for point in sweep.unfinished],
    }


def _point_json(point: Point) -> dict[str, object]:
    return {**vars(point), "policy": point.policy.value}
