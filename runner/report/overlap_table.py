"""What strategies are worth, for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.report.table import make_table
from sim.overlap.compare import Comparison
from sim.overlap.reasons import Waits, why


def print_comparison(
    comparison: Comparison, title: str, console: Console, *, per_layer: bool
) -> None:
    """Print the strategies, layer by layer where asked for, and what the search found."""
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(_table(comparison))
    if per_layer:
        console.print(_layer_table(comparison))
    for line in _verdict(comparison):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if comparison.found is not None and _gained(comparison) > 0:
        console.print(_why_table(comparison))


def _table(comparison: Comparison) -> Table:
    headers = [
        "step\nms",
        "against\none batch",
        "ms a\nlayer",
        "compute\nms",
        "commu-\nnication\nms",
    ]
    table = make_table("", ["strategy"], [*headers, "exposed\nms", "idle\n%"])
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


def _gained(comparison: Comparison) -> float:
    """Seconds that the best waits less than the reference, those of rounding left out."""
    gained = comparison.reference.turns.exposed - comparison.best.turns.exposed
    return gained if gained > 1e-9 else 0.0


def _verdict(comparison: Comparison) -> list[str]:
    found, reference = comparison.found, comparison.reference
    if found is None:
        return []
    decided = f"search: all {found.placements:,} placements decided"
    if not _gained(comparison):
        return [f"{decided}: none waits less than {reference.name}"]
    gained, step = _gained(comparison), reference.turns.seconds
    lines = [
        f"{decided}: the best waits {_ms(gained)} ms less than {reference.name}, "
        f"{100 * gained / step:.1f} % of its step",
        f"best, {found.best.delta_stages} ahead: {found.best.describe()}",
    ]
    if comparison.best.turns.seconds >= comparison.runs[0].turns.seconds:
        lines.append(_faster_whole(comparison))
    return lines


def _faster_whole(comparison: Comparison) -> str:
    """What halving costs more than it hides."""
    whole, best = comparison.runs[0].turns, comparison.best.turns
    less = whole.exposed - best.exposed
    return (
        f"one batch is faster still: two halves compute {_ms(best.compute - whole.compute)} ms "
        f"more and wait {_ms(abs(less))} ms {'less' if less >= 0 else 'more'}"
    )


def _why_table(comparison: Comparison) -> Table:
    title = f"Why: what the GPU waits for, {comparison.reference.name} against the best"
    table = make_table(title, ["collective"], ["on link\nms", "waited\nms", "best\nms"])
    table.add_column(
        "beside it in the best: operations of the other half, own ones", overflow="fold"
    )
    for waits in why(comparison.reference.turns, comparison.best.turns):
        table.add_row(waits.name, *map(_ms, (waits.seconds, *waits.waited)), _beside(waits))
    return table


def _beside(waits: Waits) -> str:
    same = waits.beside[0] == waits.beside[1]
    return f"{waits.beside[1]} (the same)" if same else waits.beside[1]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"
