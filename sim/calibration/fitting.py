"""Small fits: constants from samples, without a numerics library, and what is told of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True)
class Fitted:
    """One line of what was fitted: its name, its value, and out of how many samples."""

    name: str
    value: str
    samples: int


def crossing(function: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function crosses 0 between ``low`` and ``high``, or the nearer end."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


def minimum(function: Callable[[float], float], low: float, high: float, rounds: int = 60) -> float:
    """Where a function of one valley is least, by golden section."""
    ratio = (5**0.5 - 1) / 2
    for _ in range(rounds):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if function(left) < function(right) else (left, high)
    return (low + high) / 2


def non_negative(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """Least squares with coefficients of at least 0, for a few columns.

    Of every subset of columns the plain solution is made; the best one without a negative
    coefficient is the answer.
    """
    width = len(rows[0])
    best, least = [0.0] * width, sum(target**2 for target in targets)
    for size in range(1, width + 1):
        for chosen in combinations(range(width), size):
            part = [[row[column] for column in chosen] for row in rows]
            solution = _least_squares(part, targets)
            if solution is None or min(solution) < 0:
                continue
            found = [0.0] * width
            for column, value in zip(chosen, solution, strict=True):
                found[column] = value
            error = sum(
                (sum(a * x for a, x in zip(row, found, strict=True)) - target) ** 2
                for row, target in zip(rows, targets, strict=True)
            )
            if error < least * (1 - 1e-9):
                best, least = found, error
    return best


_KNOWN_SECONDS = 0.3


def near_known(
    rows: Sequence[Sequence[float]], targets: Sequence[float], known: Sequence[float]
) -> list[float]:
    """As :func:`non_negative`, in seconds, with what was known before as a sample of its own.

    Each known coefficient counts as if 0.3 s had once been measured at it, so that samples which
    hardly depend on a coefficient leave it where it was.
    """
    width = len(known)
    prior = [
        [_KNOWN_SECONDS / known[i] if i == column else 0.0 for i in range(width)]
        for column in range(width)
        if known[column] > 0
    ]
    return non_negative([*rows, *prior], [*targets, *(_KNOWN_SECONDS for _ in prior)])


def _least_squares(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float] | None:
    """Solve the normal equations; None where they have no single solution."""
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
