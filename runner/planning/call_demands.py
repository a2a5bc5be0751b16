"""Every M that a server's recorded calls can have."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from runner.backend.token_to_m import hc_num_splits
from runner.kernels.call_template import CallShape, Template
from runner.kernels.table import Demand
from runner.kernels.types import CONTIGUOUS_M_ALIGNMENT
from runner.recording.recording import CallGroup, Recording

_LEAST_M = {"kernels/linear/scaled_mm/flashinfer.py": 32}
"""Callers that give fewer rows to another library (vLLM 0.33: FlashInfer's below 32)."""

_SPLITS = "tf32_hc_prenorm_gemm"
_OBJECTS = ("float32", "bfloat16", "float16", "int32", "float8_e4m3fn", "inf", "-inf", "nan")
"""Arguments that are objects and can be made again: types, and numbers that JSON does not have."""

_BUCKETS = ((1, 4, 16), (1, 2, 4, 8, 16))
"""Numbers of splits that fused kernels are made for; servers round down to one of them."""


@dataclass
class CallDemands:
    """What to plan, and what could not be generalised, in words."""

    demands: list[Demand] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def call_demands(recording: Recording, *, max_tokens: int, num_sms: int) -> CallDemands:
    """Generalise each recorded call to all M of up to ``max_tokens`` tokens.

    Args:
        num_sms: SMs of the GPU, for calls made without a limit.
    """
    found = CallDemands()
    families: dict[str, list[CallGroup]] = {}
    for group in recording.groups:
        sms = group.num_sms or num_sms
        if unplanned := _why_unplanned(group):
            found.notes.append(f"not planned: {group.title} ({unplanned})")
            continue
        if group.reason:
            found.notes.append(f"planned for its own sizes only: {group.title} ({group.reason})")
        if group.call.function == _SPLITS and group.ms and _splits_of(group.call) is not None:
            families.setdefault(_family(group, sms), []).append(group)
        else:
            step = _m_step(group)
            shape = CallShape.of(group.call, sms, step)
            found.demands.append(Demand(shape, _ms(group, step, max_tokens)))
    for groups in families.values():
        found.demands += _split_demands(groups, found.notes, max_tokens, num_sms)
    return found


def _why_unplanned(group: CallGroup) -> str:
    """Why a call cannot be made again; empty if it can."""
    if group.errors:
        return f"it failed in the server: {group.errors[0]}"
    objects = [*_objects([*group.call.args, *group.call.kwargs.values()])]
    strange = [name for name in objects if name not in _OBJECTS]
    return f"the argument {strange[0]} is no plain value" if strange else ""


def _objects(items: Sequence[object]) -> Iterator[str]:
    for item in items:
        if isinstance(item, list):
            yield from _objects(item)
        elif isinstance(item, Mapping) and "object" in item:
            yield str(item["object"])


def _ms(group: CallGroup, step: int, max_tokens: int) -> Sequence[int]:
    seen = group.ms
    if not seen:
        return (1,)  # It has no M.
    if group.walked:
        return seen
    least = max(
        (m for name, m in _LEAST_M.items() if any(name in line for line in group.by)), default=1
    )
    least = min(max(least, step), seen[0])
    return range(least, max(max_tokens, seen[-1]) + 1, step)


def _m_step(group: CallGroup) -> int:
    """The alignment of contiguous rows, which is smaller where the server has set another one."""
    call = group.call
    contiguous = call.function.endswith("_contiguous") and not call.kwargs.get("use_psum_layout")
    return math.gcd(CONTIGUOUS_M_ALIGNMENT, *group.ms) if contiguous else 1


# -- the hyper-connection GEMM, whose number of splits follows M as the server chooses


def _splits_of(call: Template) -> int | None:
    splits = call.kwargs.get("num_splits", call.args[4] if len(call.args) > 4 else None)
    return splits if isinstance(splits, int) else None


def _with_splits(call: Template, splits: int) -> Template:
    """The same call with another number of splits."""
    old = _splits_of(call)

    def change(item: object) -> object:
        shape = item.get("shape") if isinstance(item, Mapping) else None
        if isinstance(item, Mapping) and shape and shape[0] == old:
            return {**item, "shape": [splits, *shape[1:]]}
        return splits if type(item) is int and item == old else item

    args = [*call.args[:2], *map(change, call.args[2:])]
    return Template(call.function, args, {k: change(value) for k, value in call.kwargs.items()})


def _family(group: CallGroup, num_sms: int) -> str:
    """A key that is equal for calls that differ in M and splits alone, from one place."""
    call = _with_splits(group.call, 0)
    place = group.by[0].rpartition(":")[2] if group.by else ""
    return json.dumps([call.args, call.kwargs, num_sms, place], sort_keys=True)


def _split_demands(
    groups: Sequence[CallGroup], notes: list[str], max_tokens: int, num_sms: int
) -> Iterator[Demand]:
    seen = [(m, _splits_of(group.call)) for group in groups for m in group.ms]
    first, sms = groups[0], groups[0].num_sms or num_sms
    buckets = _buckets(seen, _k_of(first.call), sms)
    if buckets is None:
        notes.append(
            f"planned for the numbers of splits that were seen only: {first.title} "
            "(how the server chooses them is not known)"
        )
        for group in groups:
            yield Demand(CallShape.of(group.call, sms), group.ms)
        return
    by_splits: dict[int, list[int]] = {}
    for m in range(1, max(max_tokens, *(m for m, _ in seen)) + 1):
        by_splits.setdefault(_rounded(m, _k_of(first.call), sms, buckets), []).append(m)
    for splits, ms in by_splits.items():
        yield Demand(CallShape.of(_with_splits(first.call, splits), sms), ms)


def _buckets(
    seen: Sequence[tuple[int, int | None]], k: int, num_sms: int
) -> tuple[int, ...] | None:
    """The numbers that the server rounds down to, () for none; None if no rule explains them."""
    for buckets in ((), *_BUCKETS):
        if all(_rounded(m, k, num_sms, buckets) == splits for m, splits in seen):
            return buckets
    return None


def _rounded(m: int, k: int, num_sms: int, buckets: Sequence[int]) -> int:
    wanted = hc_num_splits(m, k, num_sms)
    return max((splits for splits in buckets if splits <= wanted), default=wanted)


def _k_of(call: Template) -> int:
    """K of the GEMM: columns of its first argument."""
    first = call.args[0]
    assert isinstance(first, Mapping)
    return int(first["shape"][-1])
