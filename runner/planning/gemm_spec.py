"""Parse ``TYPE:N:K[:GROUPS]``, which names one GEMM on the command line."""

from __future__ import annotations

from runner.errors import UserError
from runner.kernels.heuristics_sm90 import CONTIGUOUS_M_ALIGNMENT
from runner.kernels.table import Demand
from runner.kernels.types import CONTIGUOUS_TYPES, MASKED_TYPES, GemmShape
from runner.kernels.types import DeepGemmKernelType as T
from runner.planning.demands import ms_by_splits
from runner.scenario import MAX_SMS

_GROUPED = CONTIGUOUS_TYPES | MASKED_TYPES | {T.FP8_EINSUM_BHR_HDR_BHD}
_LARGEST = 2**31 - 1


def gemm_demands(spec: str, *, max_m: int, num_sms: int) -> list[Demand]:
    """The GEMM with every M up to ``max_m``; for contiguous types, multiples of 128 only.

    The hyper-connection GEMM has one demand per number of splits. Without GROUPS, or with 1, the
    number depends on M: see ``runner.backend.token_to_m.hc_num_splits``. GROUPS 0 means no splits,
    and any other value is the number of splits.

    Raises:
        UserError: the text is malformed, or a size is out of range.
    """
    kind, n, k, groups = _parse(spec)
    if not 1 <= max_m <= 1 << 20:
        raise UserError(f"--max-m {max_m} must lie in 1..{1 << 20}")
    if not 1 <= num_sms <= MAX_SMS:
        raise UserError(f"--num-sms {num_sms} must lie in 1..{MAX_SMS}")
    if kind is T.TF32_HC_PRENORM_GEMM:
        return _split_demands(n, k, groups, max_m, num_sms)
    if groups == 0:
        raise UserError(f"--gemm {spec!r}: GROUPS must be at least 1")
    if groups not in (None, 1) and kind not in _GROUPED:
        raise UserError(f"--gemm {spec!r}: {kind.name.lower()} takes no GROUPS")
    step = CONTIGUOUS_M_ALIGNMENT if kind in CONTIGUOUS_TYPES else 1
    if max_m < step:
        raise UserError(f"--max-m {max_m} must be at least {step} for {kind.name.lower()}")
    shape = GemmShape(kind, n, k, groups if groups is not None else 1, num_sms)
    return [Demand(shape, range(step, max_m + 1, step))]


def _parse(spec: str) -> tuple[T, int, int, int | None]:
    words = spec.split(":")
    kinds = {kind.name.lower(): kind for kind in T}
    if words[0] not in kinds:
        known = ", ".join(kinds)
        raise UserError(f"--gemm {spec!r}: type {words[0]!r} is not known: use one of {known}")
    sizes = words[1:]
    if not 2 <= len(sizes) <= 3 or not all(word.isdecimal() and word.isascii() for word in sizes):
        raise UserError(f"--gemm {spec!r} must be TYPE:N:K or TYPE:N:K:GROUPS with whole numbers")
    numbers = [int(word) for word in sizes]
    if min(numbers[:2]) < 1 or max(numbers) > _LARGEST:
        raise UserError(f"--gemm {spec!r}: N and K must lie in 1..{_LARGEST}")
    return kinds[words[0]], numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else None


def _split_demands(n: int, k: int, groups: int | None, max_m: int, num_sms: int) -> list[Demand]:
    kind = T.TF32_HC_PRENORM_GEMM
    if groups is not None and groups != 1:
        return [Demand(GemmShape(kind, n, k, groups, num_sms), range(1, max_m + 1))]
    by_splits = ms_by_splits(k, range(1, max_m + 1), num_sms)
    return [
        Demand(GemmShape(kind, n, k, splits, num_sms), tuple(ms))
        for splits, ms in by_splits.items()
    ]
