"""A layer's operations, their yield marks, and running two batches in turns."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.backend.base import Backend
from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.backend.step_runner import ScheduleRecorder
from runner.backend.weights import ShapeWeights
from runner.config.hf import with_layers
from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV3, DSV4_TINY
from runner.model.context import RankContext
from runner.model.dsv3 import Dsv3Layer
from runner.model.dsv4 import Dsv4Layer
from runner.model.model_runner import ModelRunner
from runner.model.operations import (
    LayerState,
    Operation,
    cut_stages,
    overlapped_order,
    run_overlapped,
)
from runner.model.stage import PipelineStage
from runner.model.strategy import NEEDS
from runner.schedule import Mark, Op

DENSE = "comm_prepare_attn, attn_prepare, attn_core, comm_prepare_mlp, mlp, comm_postprocess_layer"


def context(recorder: ScheduleRecorder, parallel: ParallelConfig) -> RankContext:
    return RankContext(Backend(recorder, num_sms=132), ShapeWeights(), parallel, rank=0)


def test_layers_with_experts_have_the_operations_of_overlap_strategies() -> None:
    dsv3 = Dsv3Layer(context(ScheduleRecorder(), ParallelConfig(tp=2)), DSV3, 3)
    dsv4 = Dsv4Layer(context(ScheduleRecorder(), ParallelConfig()), DSV4_TINY, 1)
    for layer in (dsv3, dsv4):
        assert layer.has_experts and set(layer.operations()) == set(NEEDS)


def test_dense_layers_have_a_fixed_order_of_operations() -> None:
    layer = Dsv3Layer(context(ScheduleRecorder(), ParallelConfig(tp=2)), DSV3, 2)
    assert not layer.has_experts and ", ".join(layer.operations()) == DENSE


def recorded_forward(model: ModelConfig, mode: ForwardMode) -> list[Op]:
    recorder = ScheduleRecorder()
    parallel = ParallelConfig(tp=2)
    runner = ModelRunner.build(model, parallel, 0, backend=Backend(recorder, num_sms=132))
    make = ForwardBatch.extend if mode.is_extend else ForwardBatch.decode
    runner.forward(make((1,) * 8))
    return recorder.ops


@pytest.mark.parametrize(("mode", "yields"), [(ForwardMode.DECODE, 5), (ForwardMode.EXTEND, 2)])
def test_recorded_forward_has_layer_and_yield_marks(mode: ForwardMode, yields: int) -> None:
    ops = recorded_forward(with_layers(DSV3, 5), mode)
    marks = [op for op in ops if isinstance(op, Mark)]
    expected = [Mark("forward", f"{mode.name} 8")]
    for layer in range(5):
        expected.append(Mark("layer", str(layer)))
        expected += [Mark("yield", "")] * (0 if layer < 3 else yields)
    assert marks == [*expected, Mark("layer", "end")]


def test_state_left_behind_by_operations_is_an_error() -> None:
    stage = PipelineStage(context(ScheduleRecorder(), ParallelConfig()), DSV4_TINY)
    layer = stage._layers[0][1]
    forgetful = {"forget": lambda state: state.update(latent=state["hidden_states"])}
    layer.has_experts, layer.operations = False, lambda: forgetful  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"^operations left state behind: latent$"):
        stage.forward(ForwardBatch.decode((1,)), None)


# -- execution ------------------------------------------------------------------------------------


def noting(seen: list[Any], name: str) -> Operation:
    return lambda state: seen.append((name, state["half"]))


def test_cut_stages_ignores_empty_stages() -> None:
    a, b = noting([], "a"), noting([], "b")
    assert cut_stages(["|", a, "|", "|", b, "|"]) == [(a,), (b,)]
    assert cut_stages(["|"]) == []


def test_overlapped_order_with_one_batch_ahead() -> None:
    assert overlapped_order(3, 2) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert overlapped_order(4, 1) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (0, 2),
        (1, 1),
        (0, 3),
        (1, 2),
        (1, 3),
    ]


@given(st.integers(0, 40), st.data())
def test_overlapped_order_runs_each_stage_once_and_keeps_the_lead(
    stages: int, data: st.DataObject
) -> None:
    delta = data.draw(st.integers(0, stages))
    order = overlapped_order(stages, delta)
    for batch in (0, 1):
        assert [stage for which, stage in order if which == batch] == list(range(stages))
    ahead = 0
    for which, _ in order:
        ahead += 1 if which == 0 else -1
        assert 0 <= ahead <= delta + 1


def test_run_overlapped_alternates_batches_with_separate_states() -> None:
    seen: list[Any] = []
    stages = [(noting(seen, "a"), noting(seen, "b")), (noting(seen, "c"),)]
    states: tuple[LayerState, LayerState] = ({"half": 0}, {"half": 1})
    run_overlapped(states, stages, 1, lambda kind, name: seen.append(f"{kind} {name}"))
    assert seen == [
        "batch 0",
        ("a", 0),
        ("b", 0),
        "batch 0",
        ("c", 0),
        "batch 1",
        ("a", 1),
        ("b", 1),
        "batch 1",
        ("c", 1),
        "batch both",
    ]
