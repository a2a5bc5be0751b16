"""A sweep's points, their results, and the frontier: the points that no other beats."""

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
    """One combination of a layout, a node's CPU cores and a policy."""

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
        up_seconds: until the first request is answered; rounded to microseconds so that noise
            decides no tie.
        kernels_compiled: number of compiles; a kernel compiled on two ranks or nodes counts twice.
        duplicates: compiles of a kernel beyond its first.
        cpu_seconds: core-seconds that the compiles used.
        present: planned kernels on the worst node's disk at the end.
        planned: kernels that the deployment can ever need.
        timeout_seconds: when a collective's watchdog ends the run; None if none does.
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
        """Exact fraction of the plan that is present; 1 for an empty plan."""
        return Fraction(self.present, self.planned) if self.planned else Fraction(1)


@dataclass(frozen=True)
class Skipped:
    """A combination that does not fit, and why, on one line."""

    point: Point
    reason: str


def count_reasons(skipped: Iterable[Skipped]) -> list[tuple[str, int]]:
    """Each distinct reason and how many points it skipped, most frequent first."""
    return Counter(item.reason for item in skipped).most_common()


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The result of a sweep.

    Attributes:
        settings: what all points share, as plain data.
        results: the simulated points, fastest first.
        skipped: combinations that do not fit.
        unfinished: points not reached before the sweep was stopped.
    """

    settings: dict[str, Any]
    results: tuple[Result, ...]
    skipped: tuple[Skipped, ...]
    unfinished: tuple[Point, ...] = ()

    @cached_property
    def frontier(self) -> frozenset[Point]:
        """The points that no other beats; runs that the watchdog ends are left out.

        A point beats another if it is at least as fast and covers at least as much, and they
        differ in one of these. Equal points are on the frontier together or not at all.
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
    """Sort fastest first; of equally fast results, the larger coverage, then the given order."""
    return sorted(results, key=lambda result: (result.up_seconds, -result.coverage))
