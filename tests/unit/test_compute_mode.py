"""Whether a launch computes, and what cannot go with that."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")

from launch.compute_mode import check_graphs, compute_mode
from launch.options import LaunchOptions
from runner.config.environ import Environ
from runner.config.model import ModelConfig
from runner.config.presets import PRESETS
from runner.config.warmup import WarmupPolicy
from runner.errors import UserError
from runner.scenario import Scenario

SMALL, LARGE = PRESETS["dsv4-tiny"], PRESETS["dsv4"]
OPTIONS = LaunchOptions(model="dsv4-tiny")


@pytest.mark.parametrize(
    ("asked", "device", "model", "expected"),
    [
        (None, "cpu", SMALL, ("real", "the model is small")),
        (None, "cuda", LARGE, ("real", "on a GPU")),
        ("skip", "cuda", LARGE, ("skip", "as asked")),
        ("real", "cpu", LARGE, ("real", "as asked")),
    ],
)
def test_what_is_computed(
    asked: str | None, device: str, model: ModelConfig, expected: tuple[str, str]
) -> None:
    assert compute_mode(replace(OPTIONS, compute=asked), device, model) == expected


def test_many_weights_are_not_computed_with_on_a_cpu() -> None:
    mode, why = compute_mode(OPTIONS, "cpu", LARGE)
    assert mode == "skip"
    assert why.endswith(" G weights are too many for math on a CPU")


def scenario(tp: int, sizes: tuple[int, ...]) -> Scenario:
    options = replace(OPTIONS, tp=tp, cuda_graphs=sizes)
    return options.scenario(Environ(), policy=WarmupPolicy.NONE)


def test_a_graph_holds_nothing_that_goes_through_the_host() -> None:
    with pytest.raises(UserError, match=r"--cuda-graphs with --tp above 1 needs NCCL"):
        check_graphs(scenario(2, (1, 8)), on_gpu=True, backend="gloo")
    check_graphs(scenario(2, (1, 8)), on_gpu=True, backend="nccl")
    check_graphs(scenario(2, (1, 8)), on_gpu=False, backend="gloo")
    check_graphs(scenario(1, (1, 8)), on_gpu=True, backend="gloo")
    check_graphs(scenario(2, ()), on_gpu=True, backend="gloo")
