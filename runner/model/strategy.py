"""Where a layer's operation list yields: SGLang's decode and prefill placements.

Decode: ``|`` before attn_core, dispatch_a, dispatch_b, combine_b and output, six stages a layer,
with shared_experts in the shadow of the dispatch. Prefill: before dispatch_b and after combine_a,
with shared_experts in the shadow of the combine.
"""

from __future__ import annotations

from runner.forward_batch import ForwardMode
from runner.model.operations import Operation, Step, YieldOperation

_DECODE_ORDER = ("dispatch_a", "shared_experts", "dispatch_b", "experts", "combine_a", "combine_b")
_EXTEND_ORDER = ("dispatch_a", "dispatch_b", "experts", "combine_a", "shared_experts", "combine_b")
_DECODE_YIELDS = frozenset({"attn_core", "dispatch_a", "dispatch_b", "combine_b", "output"})
_EXTEND_YIELDS = frozenset({"dispatch_b", "shared_experts"})


def with_yields(mode: ForwardMode, *operations: Operation) -> list[Step]:
    """Order the expert operations as the mode's strategy does and put its yield marks in.

    Layers without experts (dense ones) have none of these operations and get no marks.
    """
    by_name = {operation.name: operation for operation in operations}
    order = _EXTEND_ORDER if mode.is_extend else _DECODE_ORDER
    yields = _EXTEND_YIELDS if mode.is_extend else _DECODE_YIELDS
    if "dispatch_a" not in by_name:
        return list(operations)
    expert_slots = iter(order)
    steps: list[Step] = []
    for operation in operations:
        name = next(expert_slots) if operation.name in order else operation.name
        if name in yields:
            steps.append(YieldOperation())
        steps.append(by_name[name])
    return steps
