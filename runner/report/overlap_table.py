"""Compare overlap strategies in terminal tables and as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.report.console import make_table
from sim.overlap.compare import Comparison, Run
from sim.overlap.measured import Row
from sim.overlap.turns import explain_waits


def print_comparison(
    comparison: Comparison, title: str, console: Console, *, per_layer: bool
) -> None:
    """Print the strategies, each layer's waits if asked for, and the search's result."""
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(_strategy_table(comparison))
    if per_layer:
        console.print(_layer_table(comparison))
    for line in _search_lines(comparison):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if comparison.found is not None and _gain(comparison) > 0:
        console.print(_why_table(comparison))


def _strategy_table(comparison: Comparison) -> Table:
    headers = ["step\nms", "against\none batch", "ms a\nlayer", "compute\nms"]
    headers += ["commu-\nnication\nms", "exposed\nms", "idle\n%"]
    table = make_table("", ["strategy"], headers)
    whole, layers = comparison.runs[0].turns.seconds, len(comparison.layers)
    for run in comparison.runs:
        turns = run.turns
        table.add_row(
            Text(run.name),
            _ms(turns.seconds),
            "-" if run.strategy is None else f"{100 * (turns.seconds / whole - 1):+.1f} %",
            _ms(sum(part.compute + part.exposed for part in turns.by_layer()) / layers),
            _ms(turns.compute),
            _ms(turns.communication),
            _ms(turns.exposed),
            f"{100 * turns.exposed / turns.seconds:.1f}",
        )
    return table


def _layer_table(comparison: Comparison) -> Table:
    title = "Each layer's exposed communication, ms"
    table = make_table(title, ["layer"], [run.name for run in comparison.runs])
    totals = [run.turns.by_layer() for run in comparison.runs]
    for index, layer in enumerate(comparison.layers):
        table.add_row(str(layer), *(_ms(its[index].exposed) for its in totals))
    return table


def _gain(comparison: Comparison) -> float:
    """Seconds that the best waits less than the reference; 0 for rounding differences."""
    gain = comparison.reference.turns.exposed - comparison.best.turns.exposed
    return gain if gain > 1e-9 else 0.0


def _search_lines(comparison: Comparison) -> list[str]:
    found, reference = comparison.found, comparison.reference
    if found is None:
        return []
    decided = f"search: all {found.placements:,} placements decided"
    gain = _gain(comparison)
    if not gain:
        return [f"{decided}: none waits less than {reference.name}"]
    lines = [
        f"{decided}: the best waits {_ms(gain)} ms less than {reference.name}, "
        f"{100 * gain / reference.turns.seconds:.1f} % of its step",
        f"best, {found.best.delta_stages} ahead: {found.best.describe()}",
    ]
    whole, best = comparison.runs[0].turns, comparison.best.turns
    if best.seconds >= whole.seconds:
        less = whole.exposed - best.exposed
        lines.append(
            f"one batch is faster still: two halves compute {_ms(best.compute - whole.compute)} "
            f"ms more and wait {_ms(abs(less))} ms {'less' if less >= 0 else 'more'}"
        )
    return lines


def _why_table(comparison: Comparison) -> Table:
    title = f"Why: what the GPU waits for, {comparison.reference.name} against the best"
    table = make_table(title, ["collective"], ["on link\nms", "waited\nms", "best\nms"])
    table.add_column('computed meanwhile in the best ("own": by the same half)', overflow="fold")
    for waits in explain_waits(comparison.reference.turns, comparison.best.turns):
        before, after = waits.meanwhile
        meanwhile = f"{after} (the same)" if before == after else after
        table.add_row(waits.name, *map(_ms, (waits.seconds, *waits.waited)), meanwhile)
    return table


def _ms(seconds: str | float) -> str:
    return f"{1e3 * float(seconds):.2f}"


def validation_table(rows: Sequence[Row], machine: Mapping[str, object]) -> Table:
    """Measured steps and their predictions, in milliseconds."""
    headers = ["step", "noted", "exposed", "predicted", "exposed"]
    title = f"Measured on {machine['gpu'] or 'CPU'}, {machine['date']}: ms"
    table = make_table(title, ["strategy"], headers)
    for row in rows:
        name, *seconds = row.values()
        table.add_row(Text(str(name)), *map(_ms, seconds))
    return table


def comparison_json(comparison: Comparison) -> dict[str, object]:
    """A comparison as plain data, in seconds."""
    return {
        "first_layer": comparison.layers[0],
        "overlapped_layers": len(comparison.layers),
        "runs": [_run_json(run) for run in comparison.runs],
        "reference": comparison.reference.name,
        "placements_searched": None if comparison.found is None else comparison.found.placements,
    }


def _run_json(run: Run) -> dict[str, object]:
    turns = run.turns
    return {
        "name": run.name,
        "strategy": None if run.strategy is None else run.strategy.to_json(),
        "step_seconds": turns.seconds,
        "compute_seconds": turns.compute,
        "communication_seconds": turns.communication,
        "exposed_seconds": turns.exposed,
        "idle_share": turns.exposed / turns.seconds,
        "layers": [vars(part) for part in turns.by_layer()],
    }
