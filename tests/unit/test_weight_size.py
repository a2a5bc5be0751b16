"""Weight sizes, counted without making the weights."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from runner.backend.base import Backend
from runner.backend.step_runner import ScheduleRecorder
from runner.backend.tensor import Fp8Weight, Tensor
from runner.backend.weights import ShapeWeights, WeightRequest
from runner.config.hf import from_hf, with_layers
from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV3, DSV4, DSV4_TINY
from runner.model.model_runner import ModelRunner
from runner.planning.weight_size import WeightSize, model_elements, weight_size
from tests.models import DSV3_SMALL

SMALL = from_hf(DSV3_SMALL, "dsv3-small")


class RecordingWeights(ShapeWeights):
    """Records every weight request."""

    def __init__(self) -> None:
        self.requests: list[WeightRequest] = []

    def make(self, request: WeightRequest) -> Tensor:
        self.requests.append(request)
        return super().make(request)

    def make_fp8(self, request: WeightRequest) -> Fp8Weight:
        self.requests.append(request)
        return super().make_fp8(request)


def requests(model: ModelConfig, parallel: ParallelConfig, rank: int) -> list[WeightRequest]:
    kept = RecordingWeights()
    backend = Backend(ScheduleRecorder(), num_sms=1)
    ModelRunner.build(model, parallel, rank, backend=backend, weights=kept)
    return kept.requests


def size_of_request(request: WeightRequest) -> tuple[int, int]:
    """Elements and bytes of the local slice; FP8 has an fp32 scale per 128 x 128 block."""
    elements = prod(dim.width for dim in request.dims)
    if request.kind == "fp8":
        *outer, n, k = request.view
        return elements, elements + 4 * prod(outer) * -(-n // 128) * -(-k // 128)
    return elements, elements * {"bf16": 2, "fp32": 4, "ids": 8}[request.kind]


@pytest.mark.parametrize("model", [DSV4_TINY, SMALL, with_layers(DSV4, 4)], ids=lambda m: m.name)
@pytest.mark.parametrize("values", [{}, {"pp": 2}, {"tp": 2}, {"pp": 2, "tp": 2, "ep": True}])
def test_weight_size_is_the_sum_over_all_weight_requests(
    model: ModelConfig, values: dict[str, Any]
) -> None:
    parallel = ParallelConfig(**values)
    for rank in range(parallel.world_size):
        sizes = [size_of_request(request) for request in requests(model, parallel, rank)]
        elements, nbytes = (sum(column) for column in zip(*sizes, strict=True))
        shapes = {(r.kind, r.view, r.high): prod(r.view) for r in requests(model, parallel, rank)}
        assert weight_size(model, parallel, rank) == WeightSize(
            elements, nbytes, sum(shapes.values())
        )
        assert sum(shapes.values()) < elements


def test_weight_sizes_of_stages_add_up_to_the_model() -> None:
    whole = weight_size(DSV4_TINY, ParallelConfig(), 0).elements
    assert model_elements(DSV4_TINY) == whole
    stages = ParallelConfig(pp=4)
    assert sum(weight_size(DSV4_TINY, stages, rank).elements for rank in range(4)) == whole


def test_weight_size_in_bytes_matches_real_weights() -> None:
    torch = pytest.importorskip("torch")
    from runner.backend.torch_weights import TorchWeights

    parallel = ParallelConfig(pp=2, tp=2)
    maker = TorchWeights(0, torch.device("cpu"))
    tensors = []
    for request in requests(SMALL, parallel, 1):
        fp8 = request.kind == "fp8"
        tensors += maker.make_fp8(request).pair if fp8 else [maker.make(request)]
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert weight_size(SMALL, parallel, 1).nbytes == nbytes


@pytest.mark.parametrize("model", [DSV4_TINY, SMALL], ids=lambda m: m.name)
def test_elements_per_distinct_shape_match_real_shared_buffers(model: ModelConfig) -> None:
    torch = pytest.importorskip("torch")
    from runner.backend.torch_weights import TorchWeights

    parallel = ParallelConfig(pp=2, tp=2)
    for rank in range(4):
        maker = TorchWeights(0, torch.device("cpu"), share=True)
        data = [
            maker.make_fp8(request).data if request.kind == "fp8" else maker.make(request)
            for request in requests(model, parallel, rank)
        ]
        buffers = {tensor.data_ptr(): tensor.numel() for tensor in data}
        assert weight_size(model, parallel, rank).shapes == sum(buffers.values())


@pytest.mark.parametrize(("model", "billions"), [(DSV3, 671), (DSV4, 284)], ids=["dsv3", "dsv4"])
def test_models_have_their_published_number_of_weights(model: ModelConfig, billions: int) -> None:
    assert weight_size(model, ParallelConfig(), 0).elements / 1e9 == pytest.approx(
        billions, rel=0.01
    )
