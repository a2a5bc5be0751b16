"""A sweep's points, what became of each, and which of them no other one beats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from typing import Any

from runner.config.warmup import WarmupPolicy


@dataclass(frozen=True, kw_only=True)
class Point:
    """One combination: a layout, a node's CPU cores, a policy."""

    policy: WarmupPolicy
    pp: int
    tp: int
    ep: bool
    nodes: int
    cores: int


AXES = tuple(field.name for field in fields(Point))


@dataclass(frozen=True, kw_only=True)
class Result:
    """The figures of a simulated point.

    Attributes:
        up_seconds: until the first request is answered, rounded to microseconds, so that rounding
            noise decides no tie.
        kernels_compiled: number of compiles, the same kernel on two ranks or nodes counted twice.
        duplicates: compiles of a kernel beyond its first.
        cpu_seconds: seconds of CPU cores that the compiles used.
        present: planned kernels that the disk of the worst node holds in the end.
        planned: kernels that the deployment can ever need.
        timeout_seconds: when the watchdog of a collective ends the run; None if it does not.
    """

    point: Point
    up_seconds: float
    kernels_compiled: int
    duplicates: int
    cpu_seconds: float
    present: int
    planned: int
    timeout_seconds: float | None

    @property
    def coverage(self) -> Fraction:
        """The part of the plan that is present, exactly; all of an empty plan."""
        return Fraction(self.present, self.planned) if self.planned else Fraction(1)


@dataclass(frozen=True)
class Skipped:
    """A combination that does not fit, and the line that says why."""

    point: Point
    reason: str


def count_reasons(skipped: Iterable[Skipped]) -> list[tuple[str, int]]:
    """Each distinct reason with its number of points, the most frequent first."""
    return Counter(item.reason for item in skipped).most_common()


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep gave.

    Attributes:
        settings: what all points share, as plain data.
        results: the simulated points, fastest first.
        skipped: combinations that do not fit.
        unfinished: points that were not reached before the sweep was stopped.
    """

    settings: dict[str, Any]
    results: tuple[Result, ...]
    skipped: tuple[Skipped, ...]
    unfinished: tuple[Point, ...] = ()

    @cached_property
    def frontier(self) -> frozenset[Point]:
        """The points that no other one beats; a run that the watchdog ends serves nobody.

        A point beats another that is no faster and covers no more, if the two are not equal in
        both. Equal points are on the frontier together or not at all.
        """
        alive = [result for result in self.results if result.timeout_seconds is None]
        found = []
        best: tuple[float, Fraction] | None = None
        for result in by_start_up(alive):
            pair = result.up_seconds, result.coverage
            if best is None or pair[1] > best[1]:
                best = pair
            if pair == best:
                found.append(result.point)
        return frozenset(found)


def by_start_up(results: Iterable[Result]) -> list[Result]:
    """Fastest first; of equally fast ones those that cover more, then in the order given."""
    return sorted(results, key=lambda result: (result.up_seconds, -result.coverage))
