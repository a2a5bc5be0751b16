"""Operations of a layer, their order and their yield marks."""

from typing import Any

import pytest

from runner.backend.base import Backend
from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.backend.shapes import NoComm, ShapeMath, ShapeWeights
from runner.backend.sink import ScheduleRecorder
from runner.config.hf import with_layers
from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV3, DSV4_TINY
from runner.driver.model_runner import ModelRunner, NoBuffers
from runner.model.context import RankContext
from runner.model.dsv3 import Dsv3Layer
from runner.model.dsv4 import Dsv4Layer
from runner.model.operations import (
    Operation,
    OperationState,
    Step,
    YieldOperation,
    execute_operations,
)
from runner.model.strategy import PLAIN
from runner.schedule import Mark, Op


def test_state_hands_values_on_once() -> None:
    state = OperationState(batch="b")
    state.put(x=1, y=2)
    assert state.peek("x") == 1
    assert state.take("x") == 1
    state.put(x=3)
    state.replace(x=4, y=5)
    assert state.finish("batch", "y", "x") == ["b", 5, 4]
    assert state.finish() == []


def test_state_refuses_to_overwrite() -> None:
    state = OperationState(x=1)
    with pytest.raises(RuntimeError, match=r"^operation overwrites state 'x'$"):
        state.put(x=2)


@pytest.mark.parametrize("method", ["take", "peek"])
def test_state_refuses_what_nothing_has_put(method: str) -> None:
    state = OperationState(x=1)
    state.take("x")
    with pytest.raises(RuntimeError, match=r"^operation needs state 'x', which nothing has put$"):
        getattr(state, method)("x")


def test_state_refuses_to_replace_what_is_not_there() -> None:
    with pytest.raises(RuntimeError, match=r"^operation needs state 'x', which nothing has put$"):
        OperationState().replace(x=1)


def test_state_refuses_leftovers_and_gaps() -> None:
    with pytest.raises(RuntimeError, match=r"^operations left state behind: a, b$"):
        OperationState(b=1, a=2, kept=3).finish("kept")
    with pytest.raises(RuntimeError, match=r"^operation needs state 'kept', which nothing has put"):
        OperationState().finish("kept")


def test_execution_in_order_with_marks() -> None:
    seen: list[Any] = []

    def operation(name: str) -> Operation:
        return Operation(name, lambda state: seen.append((name, state.peek("batch"))))

    steps = [operation("a"), YieldOperation(), operation("b"), YieldOperation()]
    execute_operations(OperationState(batch=7), steps, lambda *mark: seen.append(mark))
    assert seen == [("a", 7), ("yield", ""), ("b", 7), ("yield", "")]


DSV3_DECODE = (
    "comm_prepare_attn, attn_prepare | attn_core, comm_prepare_mlp, gate, select_experts "
    "| dispatch_a, shared_experts | dispatch_b, experts, combine_a | combine_b "
    "| output, comm_postprocess_layer"
)
DSV3_EXTEND = (
    "comm_prepare_attn, attn_prepare, attn_core, comm_prepare_mlp, gate, select_experts, "
    "dispatch_a | dispatch_b, experts, combine_a | shared_experts, combine_b, output, "
    "comm_postprocess_layer"
)
DENSE = "comm_prepare_attn, attn_prepare, attn_core, comm_prepare_mlp, mlp, comm_postprocess_layer"
MODES = list(ForwardMode)


def show(steps: list[Step]) -> str:
    words = [step.name if isinstance(step, Operation) else "|" for step in steps]
    return ", ".join(words).replace(", |, ", " | ")


def context(recorder: ScheduleRecorder, parallel: ParallelConfig) -> RankContext:
    backend = Backend(ShapeMath(), NoComm(), recorder, num_sms=132)
    return RankContext(backend, ShapeWeights(), parallel, rank=0)


def dsv3_layer(layer: int) -> Dsv3Layer:
    return Dsv3Layer(context(ScheduleRecorder(), ParallelConfig(tp=2)), DSV3, layer)


def arranged(layer: Dsv3Layer | Dsv4Layer, mode: ForwardMode) -> str:
    return show(PLAIN[mode].arrange(layer.operations()))


ORDERS = [(ForwardMode.DECODE, DSV3_DECODE), (ForwardMode.EXTEND, DSV3_EXTEND)]


@pytest.mark.parametrize("layer", [3, 60])
@pytest.mark.parametrize(("mode", "expected"), ORDERS)
def test_order_of_a_dsv3_layer(layer: int, mode: ForwardMode, expected: str) -> None:
    assert arranged(dsv3_layer(layer), mode) == expected


def test_dense_layers_have_an_order_of_their_own() -> None:
    layer = dsv3_layer(2)
    assert not layer.has_experts and show(list(layer.operations())) == DENSE


@pytest.mark.parametrize(("mode", "expected"), ORDERS)
def test_dsv4_layers_have_the_same_operations(mode: ForwardMode, expected: str) -> None:
    layer = Dsv4Layer(context(ScheduleRecorder(), ParallelConfig()), DSV4_TINY, 1)
    assert layer.has_experts and arranged(layer, mode) == expected


def recorded_forward(model: ModelConfig, mode: ForwardMode) -> list[Op]:
    recorder = ScheduleRecorder()
    parallel = ParallelConfig(tp=2)
    runner = ModelRunner.build(
        model,
        parallel,
        0,
        backend=context(recorder, parallel).backend,
        weights=ShapeWeights(),
        buffers=NoBuffers(),
    )
    make = ForwardBatch.extend if mode.is_extend else ForwardBatch.decode
    runner.forward(make((1,) * 8))
    return recorder.ops


@pytest.mark.parametrize(("mode", "yields"), [(ForwardMode.DECODE, 5), (ForwardMode.EXTEND, 2)])
def test_recorded_layers_hold_their_marks(mode: ForwardMode, yields: int) -> None:
    ops = recorded_forward(with_layers(DSV3, 5), mode)
    marks = [op for op in ops if isinstance(op, Mark)]
    expected = [Mark("forward", f"{mode.name} 8")]
    for layer in range(5):
        expected.append(Mark("layer", str(layer)))
        expected += [Mark("yield", "")] * (0 if layer < 3 else yields)
    assert marks == [*expected, Mark("layer", "end")]


@pytest.mark.parametrize("mode", MODES)
def test_every_tiny_layer_yields_alike(mode: ForwardMode) -> None:
    ops = recorded_forward(DSV4_TINY, mode)
    yields = [op for op in ops if op == Mark("yield", "")]
    assert len(yields) == 8 * (2 if mode.is_extend else 5)
