"""Requests for weights: global shape, this rank's slice, and element type.

A request names a slice of a global array, so a model has the same weights under every tensor-,
pipeline- or expert-parallel split.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

from runner.backend.tensor import Fp8Weight, Tensor, spec
from runner.config.model import FP8_BLOCK
from runner.kernels.heuristics_sm90 import ceil_div


class Shard(NamedTuple):
    """Indices ``start`` to ``stop`` - 1 of a dimension of length ``size``."""

    size: int
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Length of the part."""
        return self.stop - self.start


def shard(size: int, parts: int, index: int) -> Shard:
    """The ``index``-th of ``parts`` equal parts of a dimension."""
    width = size // parts
    return Shard(size, index * width, (index + 1) * width)


@dataclass(frozen=True, slots=True)
class WeightRequest:
    """One weight of one rank.

    Attributes:
        layer: layer index; -1 for embedding and head.
        name: name within the layer.
        kind: ``fp8`` (e4m3 with fp32 scales of 128 x 128 blocks over the last two dimensions),
            ``bf16``, ``fp32``, or ``ids`` (int64 in [0, ``high``)).
        dims: the global dimensions, with the part of each that this rank holds.
        view: shape of the returned tensor, with the elements of the local slice.
        scale: standard deviation of the values.
        mean: mean of the values.
        high: upper bound of ``ids``, exclusive.
    """

    layer: int
    name: str
    kind: str
    dims: tuple[Shard, ...]
    view: tuple[int, ...]
    scale: float = 1.0
    mean: float = 0.0
    high: int = 0


class WeightSource(Protocol):
    """Makes weights: random values, or only shapes."""

    def make(self, request: WeightRequest) -> Tensor:
        """The local part of a bf16, fp32 or int64 weight."""

    def make_fp8(self, request: WeightRequest) -> Fp8Weight:
        """The local part of an FP8 weight."""


class ShapeWeights:
    """Weights that are only shapes."""

    def make(self, request: WeightRequest) -> Tensor:
        return spec(*request.view, dtype="int64" if request.kind == "ids" else request.kind)

    def make_fp8(self, request: WeightRequest) -> Fp8Weight:
        *groups, n, k = request.view
        scales = spec(prod(groups), ceil_div(n, FP8_BLOCK), ceil_div(k, FP8_BLOCK), dtype="fp32")
        return Fp8Weight(spec(*request.view, dtype="fp8"), scales)
