"""Small fits without a numerics library: the minimum of a function, and least squares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isclose
from operator import mul

KNOWN_SECONDS = 0.3
"""Weight of a known value: as much as one sample that is off by this many seconds."""

_MOST_ROUNDS = 100_000


def minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Minimise a function with a single valley by golden-section search."""
    ratio = (5**0.5 - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if function(left) < function(right) else (left, high)
    return (low + high) / 2


def non_negative(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """Least squares with non-negative coefficients, for a few columns.

    Sets each coefficient in turn to its best value given the others, until none changes; as the
    error is convex, this ends at the minimum.
    """
    columns = list(zip(*rows, strict=True))
    products = [[sum(map(mul, a, b)) for b in columns] for a in columns]
    wanted = [sum(map(mul, column, targets)) for column in columns]
    found = [0.0] * len(columns)
    for _ in range(_MOST_ROUNDS):
        before = list(found)
        for i, row in enumerate(products):
            if row[i]:
                found[i] = max(0.0, found[i] + (wanted[i] - sum(map(mul, row, found))) / row[i])
        if all(isclose(a, b, rel_tol=1e-13) for a, b in zip(found, before, strict=True)):
            break
    return found


def near_known(
    rows: Sequence[Sequence[float]], targets: Sequence[float], known: Sequence[float]
) -> list[float]:
    """Like :func:`non_negative`, with targets in seconds and known coefficients as samples.

    Each known coefficient counts like one measurement of 0.3 s, so samples that hardly depend on
    a coefficient leave it unchanged.
    """
    prior = [
        [KNOWN_SECONDS / value if other == column else 0.0 for other in range(len(known))]
        for column, value in enumerate(known)
        if value > 0
    ]
    return non_negative([*rows, *prior], [*targets, *(KNOWN_SECONDS for _ in prior)])
