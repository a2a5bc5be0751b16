"""Compare two Timelines: usually a prediction and a measurement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from runner.errors import UserError
from runner.report.console import make_table
from runner.report.timelines import BUSY_KINDS
from runner.timeline import Timeline

_SHOWN_AS_ZERO = 0.005
"""Half of the last digit in tables: an error relative to a smaller value means nothing."""

_COUNTS = ("kernels compiled", "distinct kernels", "duplicates")
"""Names of the figures that are counts, not seconds."""


@dataclass(frozen=True)
class Figure:
    """One number of both Timelines; None where a Timeline lacks it."""

    name: str
    a: float | None
    b: float | None  # the reference

    @property
    def relative_error(self) -> float | None:
        """``(a - b) / b``; None if ``b`` rounds to 0 in tables or either is missing."""
        if self.a is None or self.b is None or abs(self.b) < _SHOWN_AS_ZERO:
            return None
        return (self.a - self.b) / self.b

    @property
    def cells(self) -> list[str]:
        """Name, values and error, formatted for a table."""
        error, seconds = self.relative_error, self.name not in _COUNTS
        percent = 0.0 if error is None else round(100 * error, 1)
        return [
            f"{self.name} s" if seconds else self.name,
            *("-" if x is None else f"{x:.{2 if seconds else 0}f}" for x in (self.a, self.b)),
            "-" if error is None else f"{percent:+.1f} %" if percent else "0.0 %",
        ]


@dataclass(frozen=True)
class TimelineComparison:
    """Two Timelines of the same number of ranks, side by side; ``b`` is the reference."""

    a: Timeline
    b: Timeline
    summary: tuple[Figure, ...]  # wall seconds and numbers of compiles
    phases: tuple[Figure, ...]  # the reference's phases, then those only in ``a``
    kinds: tuple[Figure, ...]  # seconds by kind, summed over the ranks
    ranks: tuple[tuple[Figure, ...], ...]  # for every rank: by kind, in total, and its compiles


def compare_timelines(a: Timeline, b: Timeline) -> TimelineComparison:
    """Put two Timelines side by side; ``b`` is the reference of relative errors.

    Raises:
        UserError: the numbers of ranks differ.
    """
    if a.world_size != b.world_size:
        raise UserError(
            f"cannot compare {a.label} on {a.world_size} ranks with "
            f"{b.label} on {b.world_size} ranks: world sizes must be equal"
        )
    summary, phases, kinds, *ranks = (
        tuple(Figure(name, x.get(name), y.get(name)) for name in {**y, **x})
        for x, y in zip(_numbers(a), _numbers(b), strict=True)
    )
    return TimelineComparison(a, b, summary, phases, kinds, tuple(ranks))


def _numbers(timeline: Timeline) -> list[dict[str, float]]:
    """A Timeline's summary, phases and kinds, then each rank's figures, all by name."""
    totals = timeline.totals()
    summary = {
        "wall": timeline.wall,
        "kernels compiled": timeline.kernels_compiled,
        "distinct kernels": timeline.distinct_kernels,
        "duplicates": timeline.duplicates,
    }
    kinds = {kind: sum(getattr(rank, kind) for rank in totals) for kind in BUSY_KINDS}
    ranks = [
        {kind: getattr(rank, kind) for kind in (*BUSY_KINDS, "total")}
        | {"kernels compiled": rank.kernels_compiled}
        for rank in totals
    ]
    return [summary, timeline.phases(), kinds, *ranks]


def comparison_tables(found: TimelineComparison) -> Iterator[Table]:
    """Tabulate a comparison: summary, phases (if any), kinds, and every rank by kind.

    Seconds have two decimals. ``-`` is a missing value or undefined error; a rank's kinds that are
    0 on both sides are left out.
    """
    a, b = found.a, found.b
    title = f"A: {a.label}\nB: {b.label}\n{a.world_size} ranks"
    numbers = [f"A {a.source}", f"B {b.source}", "(A-B)/B"]
    for heading, figures in (
        (title, found.summary),
        ("Longest over ranks, by phase", found.phases),
        ("Sum over ranks, by kind", found.kinds),
    ):
        if figures:
            table = make_table(heading, [""], numbers)
            for figure in figures:
                table.add_row(*figure.cells)
            yield table
    table = make_table("Ranks, by kind", ["rank", ""], numbers)
    for rank, figures in enumerate(found.ranks):
        for index, figure in enumerate(figure for figure in figures if figure.a or figure.b):
            table.add_row("" if index else str(rank), *figure.cells)
        table.add_section()
    yield table


def comparison_json(found: TimelineComparison) -> dict[str, object]:
    """A comparison as plain data: times in seconds, relative errors as fractions or None."""
    return {
        "a": {"policy": found.a.policy, "source": found.a.source},
        "b": {"policy": found.b.policy, "source": found.b.source},
        "world_size": found.a.world_size,
        "summary": _by_name(found.summary),
        "phases": _by_name(found.phases),
        "kinds": _by_name(found.kinds),
        "ranks": [{"rank": rank, **_by_name(figures)} for rank, figures in enumerate(found.ranks)],
    }


def _by_name(figures: Sequence[Figure]) -> dict[str, dict[str, float | None]]:
    return {f.name: {"a": f.a, "b": f.b, "relative_error": f.relative_error} for f in figures}
