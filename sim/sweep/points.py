"""A sweep's points, what became of each, and which of them no other one beats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import product
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


AXES = ("policy", "pp", "tp", "ep", "nodes", "cores")
"""Names of a Point's fields."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The values of each axis; ``nodes`` None is a node for each stage."""

    policies: Sequence[WarmupPolicy]
    pp: Sequence[int]
    tp: Sequence[int]
    ep: Sequence[bool]
    nodes: Sequence[int] | None
    cores: Sequence[int]

    def points(self) -> list[Point]:
        """Every combination once; those of one layout, which share a plan, side by side."""
        return list(dict.fromkeys(self._combinations()))

    def _combinations(self) -> Iterator[Point]:
        for pp, tp, ep in product(self.pp, self.tp, self.ep):
            nodes = (pp,) if self.nodes is None else self.nodes
            for count, cores, policy in product(nodes, self.cores, self.policies):
                yield Point(policy=policy, pp=pp, tp=tp, ep=ep, nodes=count, cores=cores)


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


def frontier(pairs: Sequence[tuple[float, Fraction]]) -> list[bool]:
    """Which (seconds, coverage) pairs no other one beats.

    A pair beats another where it is as fast at least and covers as much at least, and one of both
    is better. Equal pairs do not beat each other: they are on the frontier together or not at all.
    """
    on = [False] * len(pairs)
    best: tuple[float, Fraction] | None = None
    for index in sorted(range(len(pairs)), key=lambda at: (pairs[at][0], -pairs[at][1])):
        if best is None or pairs[index][1] > best[1]:
            best = pairs[index]
        on[index] = pairs[index] == best
    return on


def frontier_points(results: Iterable[Result]) -> frozenset[Point]:
    """The points on the frontier; a run that the watchdog ends serves nobody, so it has no part."""
    alive = [result for result in results if result.timeout_seconds is None]
    on = frontier([(result.up_seconds, result.coverage) for result in alive])
    return frozenset(result.point for result, is_on in zip(alive, on, strict=True) if is_on)


def by_start_up(results: Iterable[Result]) -> list[Result]:
    """Fastest first; of equally fast ones those that cover more, then in the order given."""
    return sorted(results, key=lambda result: (result.up_seconds, -result.coverage))


def reasons(skipped: Iterable[Skipped]) -> list[tuple[str, int]]:
    """Each distinct reason with how many points it has, the most frequent first."""
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
        """See :func:`frontier_points`."""
        return frontier_points(self.results)
