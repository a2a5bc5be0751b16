"""Two Timelines side by side: usually a prediction and the measurement it is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runner.errors import UserError
from runner.report.timelines import BUSY_KINDS
from runner.timeline import RankTotals, Timeline

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = (*BUSY_KINDS, "total")


_SHOWS_AS_ZERO = 0.005
"""Half of the last digit that tables show of seconds: an error relative to less says nothing."""


@dataclass(frozen=True)
class Figure:
    """One number of both Timelines.

    Attributes:
        name: what it is.
        unit: ``s`` for seconds, empty for a count.
        a: its value in the first Timeline; None if there is none.
        b: its value in the second Timeline, the reference; None if there is none.
    """

    name: str
    unit: str
    a: float | None
    b: float | None

    @property
    def relative_error(self) -> float | None:
        """``(a - b) / b``; None where ``b`` shows as 0 or either is missing."""
        if self.a is None or self.b is None or abs(self.b) < _SHOWS_AS_ZERO:
            return None
        return (self.a - self.b) / self.b

    def to_json(self) -> dict[str, float | None]:
        """Plain data: both values and the relative error."""
        return {"a": self.a, "b": self.b, "relative_error": self.relative_error}


@dataclass(frozen=True)
class RankComparison:
    """Seconds of one rank by kind and in all, then the number of kernels it compiled."""

    rank: int
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Comparison:
    """Two Timelines of the same number of ranks, side by side.

    Attributes:
        policy_a: policy of the first Timeline.
        source_a: source of the first Timeline.
        policy_b: policy of the second Timeline, the reference.
        source_b: source of the second Timeline, the reference.
        world_size: number of ranks of both.
        summary: wall seconds and numbers of compiles.
        phases: seconds of each phase, in the reference's order, then those only in the first.
        kinds: seconds by kind, summed over the ranks.
        ranks: every rank, in order.
    """

    policy_a: str
    source_a: str
    policy_b: str
    source_b: str
    world_size: int
    summary: tuple[Figure, ...]
    phases: tuple[Figure, ...]
    kinds: tuple[Figure, ...]
    ranks: tuple[RankComparison, ...]


def compare(a: Timeline, b: Timeline) -> Comparison:
    """Put two Timelines side by side; ``b`` is the reference of relative errors.

    Raises:
        UserError: the numbers of ranks differ.
    """
    if a.world_size != b.world_size:
        raise UserError(
            f"cannot compare {a.label} on {a.world_size} ranks with "
            f"{b.label} on {b.world_size} ranks: world sizes must be equal"
        )
    totals_a, totals_b = a.totals(), b.totals()
    return Comparison(
        policy_a=a.policy,
        source_a=a.source,
        policy_b=b.policy,
        source_b=b.source,
        world_size=a.world_size,
        summary=_summary(a, b),
        phases=_phases(a.phases(), b.phases()),
        kinds=tuple(_sum_over_ranks(kind, totals_a, totals_b) for kind in BUSY_KINDS),
        ranks=tuple(_rank(*pair) for pair in zip(totals_a, totals_b, strict=True)),
    )


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Tabulate a Comparison: summary, phases (if any), kinds, and every rank by kind.

    Seconds have two decimals. A missing value or undefined error is ``-``; kinds that are 0 on
    both sides of a rank are left out.
    """
    # Here, because reading and comparing Timelines should not cost the import of rich.
    from runner.report.console import make_table

    numbers = [f"A {comparison.source_a}", f"B {comparison.source_b}", "(A-B)/B"]
    blocks = {
        _title(comparison): comparison.summary,
        "Longest over ranks, by phase": comparison.phases,
        "Sum over ranks, by kind": comparison.kinds,
    }
    tables = []
    for title, figures in blocks.items():
        if figures:
            table = make_table(title, [""], numbers)
            for figure in figures:
                table.add_row(*_cells(figure))
            tables.append(table)
    table = make_table("Ranks, by kind", ["rank", ""], numbers)
    for rank in comparison.ranks:
        shown = [figure for figure in rank.figures if figure.a or figure.b]
        for index, figure in enumerate(shown):
            name = "" if index else str(rank.rank)
            table.add_row(name, *_cells(figure), end_section=index == len(shown) - 1)
    return [*tables, table]


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Plain data of a Comparison; times in seconds, relative errors as fractions or None."""
    return {
        "a": {"policy": comparison.policy_a, "source": comparison.source_a},
        "b": {"policy": comparison.policy_b, "source": comparison.source_b},
        "world_size": comparison.world_size,
        "summary": _by_name(comparison.summary),
        "phases": _by_name(comparison.phases),
        "kinds": _by_name(comparison.kinds),
        "ranks": [{"rank": rank.rank, **_by_name(rank.figures)} for rank in comparison.ranks],
    }


def _summary(a: Timeline, b: Timeline) -> tuple[Figure, ...]:
    return (
        Figure("wall", "s", a.wall, b.wall),
        Figure("kernels compiled", "", a.kernels_compiled, b.kernels_compiled),
        Figure("distinct kernels", "", a.distinct_kernels, b.distinct_kernels),
        Figure("duplicates", "", a.duplicates, b.duplicates),
    )


def _phases(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[Figure, ...]:
    return tuple(Figure(name, "s", a.get(name), b.get(name)) for name in {**b, **a})


def _sum_over_ranks(kind: str, a: list[RankTotals], b: list[RankTotals]) -> Figure:
    sums = [sum(getattr(rank, kind) for rank in totals) for totals in (a, b)]
    return Figure(kind, "s", *sums)


def _rank(a: RankTotals, b: RankTotals) -> RankComparison:
    figures = [Figure(name, "s", getattr(a, name), getattr(b, name)) for name in _COLUMNS]
    figures.append(Figure("kernels compiled", "", a.kernels_compiled, b.kernels_compiled))
    return RankComparison(a.rank, tuple(figures))


def _by_name(figures: tuple[Figure, ...]) -> dict[str, Any]:
    return {figure.name: figure.to_json() for figure in figures}


def _title(comparison: Comparison) -> str:
    a = f"{comparison.policy_a} ({comparison.source_a})"
    b = f"{comparison.policy_b} ({comparison.source_b})"
    return f"A: {a}\nB: {b}\n{comparison.world_size} ranks"


def _cells(figure: Figure) -> list[str]:
    return [
        f"{figure.name} {figure.unit}".rstrip(),
        _number(figure.a, figure.unit),
        _number(figure.b, figure.unit),
        _percent(figure.relative_error),
    ]


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if unit else f"{value:.0f}"


def _percent(fraction: float | None) -> str:
    if fraction is None:
        return "-"
    percent = round(100 * fraction, 1)
    return f"{percent:+.1f} %" if percent else "0.0 %"
