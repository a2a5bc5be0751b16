"""Graphs where there is no GPU: the forward runs once more."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest

from runner.errors import UserError

torch = pytest.importorskip("torch")

from launch.graphs import GraphCapture  # noqa: E402


def test_without_a_gpu_the_forward_is_run() -> None:
    runs: list[int] = []
    capture = GraphCapture(torch.device("cpu"))
    capture(lambda: runs.append(1))
    capture(lambda: runs.append(2))
    assert runs == [1, 2]


def test_its_errors_are_its_own() -> None:
    def fail() -> None:
        raise RuntimeError("in the forward")

    with pytest.raises(RuntimeError, match="in the forward"):
        GraphCapture(torch.device("cpu"))(fail)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> GraphCapture:
    """What captures on a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return GraphCapture(torch.device("cuda"))


def fails_with(error: Exception) -> Callable[[], object]:
    def forward() -> object:
        raise error

    return forward


def test_what_no_graph_can_hold_is_one_line(pretended_gpu: GraphCapture) -> None:
    with pytest.raises(UserError) as caught:
        pretended_gpu(fails_with(RuntimeError("CUDA error: not permitted\nframe #0")))
    assert str(caught.value) == (
        "a CUDA graph of this forward cannot be captured: CUDA error: not permitted"
    )


def test_memory_that_runs_out_is_what_it_is(pretended_gpu: GraphCapture) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        pretended_gpu(fails_with(torch.OutOfMemoryError("Tried to allocate 2 GiB")))
