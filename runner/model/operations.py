"""A layer's forward as named operations, cut into stages, and their execution.

Names and order follow SGLang's two-batch-overlap operations. A strategy orders a layer's operations
and puts marks between them, which cut the order into stages. Two batches take turns to run the
stages, so that one communicates while the other computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict, TypeVar

from runner.backend.communication import Begun
from runner.backend.forward_batch import ForwardBatch
from runner.backend.tensor import Dispatched, Routing, Tensor


class LayerState(TypedDict, total=False):
    """Values that the operations of one batch pass on; each is stored once and popped once.

    ``batch``, ``half`` (which of two halves the batch is) and ``index_metadata`` (the indexer's
    work split) stay for the whole forward. ``residual`` is DSV3's stream [T, H]; ``mixing`` is
    DSV4's stream [T, M * H] with the weights that mix its copies.
    """

    batch: ForwardBatch
    half: int
    index_metadata: Tensor | None
    hidden_states: Tensor
    residual: Tensor
    mixing: tuple[Tensor, Tensor, Tensor]
    sublayer_input: Tensor
    sublayer_output: Tensor
    q: Tensor
    latent: Tensor
    selected: Tensor | None
    moe_input: Tensor
    router_logits: Tensor
    routing: Routing
    tokens_under_way: Begun
    routing_under_way: Begun
    dispatched: Dispatched
    expert_output: Tensor
    results_under_way: Begun
    routed_output: Tensor
    shared_output: Tensor


Operation = Callable[[LayerState], None]
"""One step of a layer."""

Stage = tuple[Operation, ...]
S = TypeVar("S")
Note = Callable[[str, str], None]
"""Records a point in the forward, by kind and name."""


def cut_stages(steps: Iterable[S | str]) -> list[tuple[S, ...]]:
    """Split operations at the marks (the strings in ``steps``); empty stages are dropped."""
    stages: list[list[S]] = [[]]
    for step in steps:
        if not isinstance(step, str):
            stages[-1].append(step)
        elif stages[-1]:
            stages.append([])
    return [tuple(stage) for stage in stages if stage]


def overlapped_order(num_stages: int, delta_stages: int) -> list[tuple[int, int]]:
    """(batch, stage) pairs in the order in which two batches run them.

    The first batch runs ``delta_stages`` stages alone, then both take turns, then the second
    batch finishes alone. ``delta_stages`` is at most ``num_stages``.
    """
    order = [(0, stage) for stage in range(delta_stages)]
    for stage in range(num_stages - delta_stages):
        order += [(0, delta_stages + stage), (1, stage)]
    return order + [(1, stage) for stage in range(num_stages - delta_stages, num_stages)]


def run_overlapped(
    states: tuple[LayerState, LayerState], stages: Sequence[Stage], delta_stages: int, note: Note
) -> None:
    """Let two batches take turns to run the stages.

    Notes ``("batch", "0")`` or ``("batch", "1")`` before each stage and ``("batch", "both")`` last.
    """
    for batch, stage in overlapped_order(len(stages), delta_stages):
        note("batch", str(batch))
        for operation in stages[stage]:
            operation(states[batch])
    note("batch", "both")
