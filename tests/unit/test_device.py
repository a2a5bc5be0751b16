"""CUDA graph capture, on a CPU and with a mocked GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")

from launch.device import Device, capture_graph  # noqa: E402
from runner.errors import UserError  # noqa: E402


def failing_with(error: Exception) -> Callable[[], None]:
    def forward() -> None:
        raise error

    return forward


@pytest.fixture
def mocked_gpu(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return torch.device("cuda")


def test_capture_on_cpu_just_runs_the_forward() -> None:
    runs: list[int] = []
    device = Device(torch.device("cpu"), "gloo")
    device.capture(lambda: runs.append(1))
    device.capture(lambda: runs.append(2))
    assert runs == [1, 2]
    with pytest.raises(RuntimeError, match="in the forward"):
        device.capture(failing_with(RuntimeError("in the forward")))


def test_failed_graph_capture_is_a_one_line_error(mocked_gpu: object) -> None:
    error = RuntimeError("CUDA error: not permitted\nframe #0")
    with pytest.raises(UserError) as caught:
        capture_graph(mocked_gpu, failing_with(error))
    assert str(caught.value) == (
        "this forward cannot be captured as a CUDA graph: CUDA error: not permitted"
    )


def test_out_of_memory_during_capture_is_raised_unchanged(mocked_gpu: object) -> None:
    error = torch.OutOfMemoryError("Tried to allocate 2 GiB")
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        capture_graph(mocked_gpu, failing_with(error))
