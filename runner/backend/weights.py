"""What weights a stage asks for: global shape, this rank's slice, element type.

A request names a slice of a global array, so that every tensor-, pipeline- or expert-parallel
split of a model holds the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class WeightRequest:
    """One weight of one rank.

    Attributes:
        layer: layer index; -1 for embedding and head.
        name: name within the layer.
        kind: ``fp8`` (e4m3 with fp32 scales of 128 x 128 blocks over the last two dimensions),
            ``bf16``, ``fp32``, or ``ids`` (int64 in [0, ``high``)).
        shape: global shape.
        slices: per dimension the (start, stop) that this rank holds.
        view: shape that the local slice is viewed as.
        scale: standard deviation of the values.
        mean: mean of the values.
        high: bound of ``ids``.
    """

    layer: int
    name: str
    kind: str
    shape: tuple[int, ...]
    slices: tuple[tuple[int, int], ...]
    view: tuple[int, ...]
    scale: float = 1.0
    mean: float = 0.0
    high: int = 0

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the slice before it is viewed as :attr:`view`."""
        return tuple(stop - start for start, stop in self.slices)


class WeightSource(Protocol):
    """Makes weights; what it returns is opaque to the model and understood by the math."""

    def make(self, request: WeightRequest) -> Any:
        """The local part of a weight."""


def whole(
    layer: int,
    name: str,
    kind: str,
    shape: tuple[int, ...],
    *,
    scale: float = 1.0,
    mean: float = 0.0,
    high: int = 0,
) -> WeightRequest:
    """A weight that every rank holds whole."""
    slices = tuple((0, size) for size in shape)
    return WeightRequest(layer, name, kind, shape, slices, shape, scale, mean, high)


def shard(size: int, parts: int, index: int) -> tuple[int, int]:
    """(start, stop) of the ``index``-th of ``parts`` equal parts of ``size``."""
    part = size // parts
    return (index * part, (index + 1) * part)
