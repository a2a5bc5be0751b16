"""Graphs where there is no GPU: the forward runs once more."""

from __future__ import annotations

import pytest

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
