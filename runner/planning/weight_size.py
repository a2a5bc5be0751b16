"""Count the size of a rank's weights without making them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from runner.backend.base import Backend
from runner.backend.step_runner import ScheduleRecorder
from runner.backend.tensor import Fp8Weight, Tensor
from runner.backend.weights import ShapeWeights, WeightRequest
from runner.config.model import FP8_BLOCK, ModelConfig
from runner.config.parallel import ParallelConfig
from runner.kernels.heuristics_sm90 import ceil_div
from runner.model.model_runner import ModelRunner

_BYTES = {"fp8": 1, "bf16": 2, "fp32": 4, "ids": 8}


@dataclass(frozen=True)
class WeightSize:
    """Weights of one rank.

    Attributes:
        elements: number of elements.
        nbytes: number of bytes, including the scales of FP8 weights.
        shapes: number of elements if weights of one kind and shape share one buffer, as in
            ``launch`` for models too large for real math.
    """

    elements: int
    nbytes: int
    shapes: int


def weight_size(model: ModelConfig, parallel: ParallelConfig, rank: int) -> WeightSize:
    """Count the weights of a rank."""
    counter = _CountingWeights()
    backend = Backend(ScheduleRecorder(), num_sms=1)
    ModelRunner.build(model, parallel, rank, backend=backend, weights=counter)
    return WeightSize(counter.elements, counter.nbytes, sum(counter.shapes.values()))


def model_elements(model: ModelConfig) -> int:
    """Elements of a whole model's weights, each counted once whatever the layout."""
    return weight_size(model, ParallelConfig(), 0).elements


class _CountingWeights(ShapeWeights):
    def __init__(self) -> None:
        self.elements = 0
        self.nbytes = 0
        self.shapes: dict[tuple[str, tuple[int, ...], int], int] = {}

    def make(self, request: WeightRequest) -> Tensor:
        self._count(request)
        return super().make(request)

    def make_fp8(self, request: WeightRequest) -> Fp8Weight:
        self._count(request)
        return super().make_fp8(request)

    def _count(self, request: WeightRequest) -> None:
        size = prod(request.view)
        self.elements += size
        self.shapes[request.kind, request.view, request.high] = size
        self.nbytes += size * _BYTES[request.kind] + _scale_bytes(request)


def _scale_bytes(request: WeightRequest) -> int:
    """Bytes of an FP8 weight's scales: one fp32 per block, including partial blocks."""
    if request.kind != "fp8":
        return 0
    *groups, n, k = request.view
    return 4 * prod(groups) * ceil_div(n, FP8_BLOCK) * ceil_div(k, FP8_BLOCK)
