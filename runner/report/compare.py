"""Two Timelines side by side: usually a prediction and the measurement that it is held against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.errors import UserError
from runner.report.timelines import BUSY_KINDS
from runner.timeline import Timeline

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN_AS_ZERO = 0.005
"""Half of the last digit that tables show: an error relative to less than that means nothing."""


@dataclass(frozen=True)
class Figure:
    """One number of both Timelines; None where a Timeline does not have it."""

    name: str
    unit: str  # ``s`` for seconds, empty for a count
    a: float | None
    b: float | None  # the reference

    @property
    def relative_error(self) -> float | None:
        """``(a - b) / b``; None where ``b`` shows as 0 or either is missing."""
        if self.a is None or self.b is None or abs(self.b) < _SHOWN_AS_ZERO:
            return None
        return (self.a - self.b) / self.b

    @property
    def cells(self) -> list[str]:
        """Name, values and error as a table shows them."""
        error = self.relative_error
        percent = 0.0 if error is None else round(100 * error, 1)
        return [
            f"{self.name} {self.unit}".rstrip(),
            *(
                "-" if value is None else f"{value:.{2 if self.unit else 0}f}"
                for value in (self.a, self.b)
            ),
            "-" if error is None else f"{percent:+.1f} %" if percent else "0.0 %",
        ]


@dataclass(frozen=True)
class TimelineComparison:
    """Two Timelines of the same number of ranks, side by side; ``b`` is the reference."""

    a: Timeline
    b: Timeline
    summary: tuple[Figure, ...]  # wall seconds and numbers of compiles
    phases: tuple[Figure, ...]  # the reference's, then those only in the first
    kinds: tuple[Figure, ...]  # seconds by kind, summed over the ranks
    ranks: tuple[tuple[Figure, ...], ...]  # of every rank: by kind, in all, and its compiles


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
    totals, phases = (a.totals(), b.totals()), (a.phases(), b.phases())
    return TimelineComparison(
        a,
        b,
        summary=(
            Figure("wall", "s", a.wall, b.wall),
            Figure("kernels compiled", "", a.kernels_compiled, b.kernels_compiled),
            Figure("distinct kernels", "", a.distinct_kernels, b.distinct_kernels),
            Figure("duplicates", "", a.duplicates, b.duplicates),
        ),
        phases=tuple(
            Figure(name, "s", phases[0].get(name), phases[1].get(name))
            for name in {**phases[1], **phases[0]}
        ),
        kinds=tuple(
            Figure(kind, "s", *(sum(getattr(rank, kind) for rank in ranks) for ranks in totals))
            for kind in BUSY_KINDS
        ),
        ranks=tuple(
            (
                *(Figure(n, "s", getattr(x, n), getattr(y, n)) for n in (*BUSY_KINDS, "total")),
                Figure("kernels compiled", "", x.kernels_compiled, y.kernels_compiled),
            )
            for x, y in zip(*totals, strict=True)
        ),
    )


def comparison_tables(found: TimelineComparison) -> Iterator[Table]:
    """Tabulate a comparison: summary, phases (if any), kinds, and every rank by kind.

    Seconds have two decimals. A missing value or undefined error is ``-``; kinds that are 0 on
    both sides of a rank are left out.
    """
    # Here, because reading and comparing Timelines should not cost the import of rich.
    from runner.report.console import make_table

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
    """Plain data of a comparison; times in seconds, relative errors as fractions or None."""
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
