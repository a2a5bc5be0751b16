"""How much a rank's weights take, counted without making them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from runner.backend.base import Backend
from runner.backend.shapes import NoComm, ShapeMath, ShapeWeights
from runner.backend.sink import ScheduleRecorder
from runner.backend.weights import WeightRequest
from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig
from runner.model_runner import ModelRunner, NoBuffers

_BYTES = {"fp8": 1 + 4 / (128 * 128), "bf16": 2, "fp32": 4, "ids": 8}


@dataclass(frozen=True)
class WeightSize:
    """Weights of one rank: their number and their bytes, FP8 with its scales."""

    elements: int
    nbytes: float


def weight_size(model: ModelConfig, parallel: ParallelConfig, rank: int) -> WeightSize:
    """Weights of a rank."""
    counter = _CountingWeights()
    backend = Backend(ShapeMath(), NoComm(), ScheduleRecorder(), num_sms=1)
    ModelRunner.build(model, parallel, rank, backend=backend, weights=counter, buffers=NoBuffers())
    return WeightSize(counter.elements, counter.nbytes)


class _CountingWeights(ShapeWeights):
    def __init__(self) -> None:
        self.elements = 0
        self.nbytes = 0.0

    def make(self, request: WeightRequest) -> Any:
        size = prod(request.view)
        self.elements += size
        self.nbytes += size * _BYTES[request.kind]
        return super().make(request)
