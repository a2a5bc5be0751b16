"""DeepGEMM calls of a recording and of a Schedule, in one form that can be compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import KernelCall
from runner.recording.recording import Recording
from tests.schedules import schedule_from_json

Call = tuple[str, int, tuple[int, ...]]


def recorded_calls(recording: Recording) -> Counter[Call]:
    """Calls by type, M and sizes, from the tensors that the library got."""
    found: Counter[Call] = Counter()
    for group in recording.groups:
        for seen in group.phases.values():
            for m, count in seen.counts.items():
                args, kwargs = group.call.at(m)
                call = sizes_of(group.call.function, args, kwargs, m)
                if call is not None:
                    found[call] += count
    return found


def shape_of(item: Any) -> list[int]:
    tensor = item[0] if isinstance(item, list) else item
    return list(tensor["shape"])


def sizes_of(function: str, args: Sequence[Any], kwargs: dict[str, Any], m: int) -> Call | None:
    """One call as (type, M, (n, k, groups)); None for what is no GEMM of the model."""
    name = function.replace("fp8_fp4", "fp8").replace("fp8_m_grouped", "m_grouped_fp8")
    if name not in TYPES:
        return None
    kind, sizes = TYPES[name]
    if name == "bf16_gemm_nt" and args[2]["dtype"] == "float32":
        kind = T.GEMM_NT_BF16BF16F32
    splits = kwargs.get("num_splits", args[4] if len(args) > 4 else None)
    return kind.name, m, sizes(args, splits)


Sizes = Callable[[Sequence[Any], Any], tuple[int, ...]]
TYPES: dict[str, tuple[T, Sizes]] = {
    "get_paged_mqa_logits_metadata": (T.PAGED_MQA_LOGITS_METADATA, lambda args, splits: ()),
    "fp8_gemm_nt": (T.GEMM_NT_F8F8BF16, lambda args, splits: (*shape_of(args[1]), 1)),
    "bf16_gemm_nt": (T.GEMM_NT_BF16BF16BF16, lambda args, splits: (*shape_of(args[1]), 1)),
    "m_grouped_fp8_gemm_nt_contiguous": (
        T.GROUPED_GEMM_NT_F8F8BF16_CONTIG,
        lambda args, splits: (*shape_of(args[1])[1:], shape_of(args[1])[0]),
    ),
    "m_grouped_fp8_gemm_nt_masked": (
        T.GROUPED_GEMM_NT_F8F8BF16_MASKED,
        lambda args, splits: (*shape_of(args[1])[1:], shape_of(args[1])[0]),
    ),
    "tf32_hc_prenorm_gemm": (
        T.TF32_HC_PRENORM_GEMM,
        lambda args, splits: (*shape_of(args[1]), splits or 0),
    ),
    "fp8_einsum": (
        T.FP8_EINSUM_BHR_HDR_BHD,
        lambda args, splits: (*shape_of(args[2])[1:], shape_of(args[2])[0]),
    ),
    "fp8_mqa_logits": (T.FP8_MQA_LOGITS, lambda args, splits: (*shape_of(args[0])[1:], 1)),
    "fp8_paged_mqa_logits": (
        T.FP8_PAGED_MQA_LOGITS,
        lambda args, splits: (*shape_of(args[0])[2:], 1),
    ),
}


def scheduled_calls(path: Path) -> Counter[Call]:
    schedule = schedule_from_json(json.loads(path.read_text()))
    calls = (op for ops in schedule.ranks for op in ops if isinstance(op, KernelCall) and op.m)
    return Counter(
        (
            call.type.name,
            call.m,
            () if call.type is T.PAGED_MQA_LOGITS_METADATA else (call.n, call.k, call.num_groups),
        )
        for call in calls
    )
