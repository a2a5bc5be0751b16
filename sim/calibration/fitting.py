"""Small fits without a numerics library: the minimum of a function, and least squares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

_KNOWN_SECONDS = 0.3
"""Seconds that a known coefficient counts for in :func:`near_known`."""


def minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one valley is least, by golden-section search."""
    ratio = (5**0.5 - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if function(left) < function(right) else (left, high)
    return (low + high) / 2


def non_negative(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """Least squares with coefficients of at least 0, for a few columns.

    Every subset of columns is solved without that bound; the best solution without a negative
    coefficient is the answer.
    """
    width = len(rows[0])
    best, least = [0.0] * width, sum(target**2 for target in targets)
    for size in range(1, width + 1):
        for columns in combinations(range(width), size):
            solution = _least_squares([[row[c] for c in columns] for row in rows], targets)
            if solution is None or min(solution) < 0:
                continue
            found = [0.0] * width
            for column, value in zip(columns, solution, strict=True):
                found[column] = value
            error = sum(
                (sum(a * x for a, x in zip(row, found, strict=True)) - target) ** 2
                for row, target in zip(rows, targets, strict=True)
            )
            if error < least * (1 - 1e-9):
                best, least = found, error
    return best


def near_known(
    rows: Sequence[Sequence[float]], targets: Sequence[float], known: Sequence[float]
) -> list[float]:
    """As :func:`non_negative`, with targets in seconds and known coefficients as samples.

    Each known coefficient counts as if 0.3 s had once been measured at it, so that samples which
    hardly depend on a coefficient leave it where it was.
    """
    prior = [
        [_KNOWN_SECONDS / value if other == column else 0.0 for other in range(len(known))]
        for column, value in enumerate(known)
        if value > 0
    ]
    return non_negative([*rows, *prior], [*targets, *(_KNOWN_SECONDS for _ in prior)])


def _least_squares(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float] | None:
    """Solve the normal equations by Gauss-Jordan; None where they have no single solution."""
    width = len(rows[0])
    scales = [max(abs(row[i]) for row in rows) or 1.0 for i in range(width)]
    scaled = [[row[i] / scales[i] for i in range(width)] for row in rows]
    matrix = [
        [sum(row[i] * row[j] for row in scaled) for j in range(width)]
        + [sum(row[i] * target for row, target in zip(scaled, targets, strict=True))]
        for i in range(width)
    ]
    for i in range(width):
        pivot = max(range(i, width), key=lambda r: abs(matrix[r][i]))
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        if abs(matrix[i][i]) < 1e-12:
            return None
        for r in range(width):
            if r != i:
                factor = matrix[r][i] / matrix[i][i]
                matrix[r] = [a - factor * b for a, b in zip(matrix[r], matrix[i], strict=True)]
    return [matrix[i][width] / matrix[i][i] / scales[i] for i in range(width)]
