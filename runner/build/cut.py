"""Cut kernels into units so that a given number of cores is done soonest."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from runner.build.costs import (
    expected_assemble_seconds,
    front_end_seconds,
    header_seconds,
)
from runner.build.unit import Job, Signature, signature
from runner.kernels.kernel import Kernel

Unit = list[Job]

_BUDGETS = [0.25 * 1.5**step for step in range(-2, 12)]


def cut_units(jobs: Sequence[Job], workers: int) -> list[Unit]:
    """Units of one header each, of the size with the smallest expected makespan."""
    by_header: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        by_header[job.kernel.header].append(job)
    choices = []
    for budget in _BUDGETS:
        units = [unit for same in by_header.values() for unit in _cut(same, budget)]
        choices.append((makespan(units, workers), len(units), units))
    return min(choices, key=lambda choice: choice[:2])[2]


def _cut(jobs: Sequence[Job], budget: float) -> list[Unit]:
    """Units of about ``budget`` seconds, evenly filled.

    Kernels of one signature never share a unit: their entries could not be told apart.
    """
    total = sum(front_end_seconds(job.kernel) for job in jobs)
    alike = Counter(signature(job.kernel) for job in jobs)
    count = max(1, min(len(jobs), ceil(total / budget)), *alike.values())
    units: list[Unit] = [[] for _ in range(count)]
    taken: list[set[Signature]] = [set() for _ in units]
    lightest = [(0.0, index) for index in range(count)]
    for job in sorted(jobs, key=lambda job: -front_end_seconds(job.kernel)):
        same, passed = signature(job.kernel), []
        while same in taken[lightest[0][1]]:
            passed.append(heapq.heappop(lightest))
        load, index = lightest[0]
        units[index].append(job)
        taken[index].add(same)
        heapq.heapreplace(lightest, (load + front_end_seconds(job.kernel), index))
        for item in passed:
            heapq.heappush(lightest, item)
    return [unit for unit in units if unit]


def unit_seconds(unit: Sequence[Job]) -> float:
    """Front end of a unit."""
    kernels = [job.kernel for job in unit]
    return header_seconds(kernels[0].header) + sum(map(front_end_seconds, kernels))


def to_end_seconds(unit: Sequence[Job]) -> float:
    """From a unit's start to the end of its last kernel, were there cores enough."""
    return unit_seconds(unit) + max(expected_assemble_seconds(job.kernel) for job in unit)


@dataclass(frozen=True, slots=True)
class Expected:
    """A step of a build, in seconds from the first front end; ``kernel`` is None for a unit's."""

    kernel: Kernel | None
    start: float
    end: float


def expected_schedule(units: Sequence[Sequence[Job]], workers: int) -> list[Expected]:
    """What the builder's order of work comes to: the longest way to the end first."""
    ready: list[tuple[float, int, float, Sequence[Job], bool]] = []
    for number, unit in enumerate(units):
        heapq.heappush(ready, (-to_end_seconds(unit), number, unit_seconds(unit), unit, True))
    running: list[tuple[float, int, float, Sequence[Job], bool]] = []
    done = []
    now, number = 0.0, len(units)
    while ready or running:
        while ready and len(running) < workers:
            _, _, seconds, jobs, is_unit = heapq.heappop(ready)
            number += 1
            heapq.heappush(running, (now + seconds, number, now, jobs, is_unit))
        now, _, start, jobs, is_unit = heapq.heappop(running)
        done.append(Expected(None if is_unit else jobs[0].kernel, start, now))
        for job in jobs if is_unit else ():
            seconds = expected_assemble_seconds(job.kernel)
            number += 1
            heapq.heappush(ready, (-seconds, number, seconds, [job], False))
    return done


def makespan(units: Sequence[Sequence[Job]], workers: int) -> float:
    """Expected seconds of a build, preprocessing left out."""
    return max((item.end for item in expected_schedule(units, workers)), default=0.0)
