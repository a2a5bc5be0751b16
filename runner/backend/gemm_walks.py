"""Walks: before a GEMM's first use, call it once with every M of a list.

Sources: SGLang 0.5.23 ``deep_gemm_wrapper/compile_utils.py`` (execution hook, full and fast lists,
memory); vLLM ``model_executor/warmup/deep_gemm_warmup.py`` (relax). The hook runs both in
recordings and in real runs, so a recorded Schedule has the walks of a real run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf

from runner.backend.token_to_m import HC_BLOCK, hc_num_splits
from runner.config.model import FP8_BLOCK
from runner.kernels.heuristics_sm90 import CONTIGUOUS_M_ALIGNMENT, align, ceil_div
from runner.kernels.types import CONTIGUOUS_TYPES, GemmShape, KernelCall, steps_of
from runner.kernels.types import DeepGemmKernelType as T
from runner.schedule import Walk

GIB = 1 << 30

_DEFAULT_MAX = 16384
_UNLIMITED_MAX = 65536
_HARD_MAX = 131072
_FAST_DENSE_UP_TO = 1024
_FAST_MAX = 32768
_RELAX_BLOCK_MS = (64, 128, 256)
_RELAX_WAVES = 10
_LEAST_HALVED = 2048

# -- lists of M -----------------------------------------------------------------------------------


def full_m_list(chunked_prefill_size: int) -> range:
    """Every M in SGLang's full list; a size below 1 means that prefill is not chunked."""
    if chunked_prefill_size < 1:
        last = _UNLIMITED_MAX
    elif chunked_prefill_size > _DEFAULT_MAX // 2:
        last = min(2 * chunked_prefill_size, _HARD_MAX)
    else:
        last = _DEFAULT_MAX
    return range(1, last + 1)


def fast_m_list(chunked_prefill_size: int) -> tuple[int, ...]:
    """Every M up to 1024, then M with a step that doubles each octave, and the largest prefill.

    As upstream, the octave that contains the largest prefill is sampled to its end.
    """
    limited = chunked_prefill_size >= 1
    largest = min(chunked_prefill_size, _FAST_MAX) if limited else _DEFAULT_MAX
    found = {*range(1, _FAST_DENSE_UP_TO + 1), largest}
    start, step = _FAST_DENSE_UP_TO, 2
    while start < largest:
        found.update(range(start, 2 * start, step))
        start, step = 2 * start, 2 * step
    return tuple(sorted(found))


def relax_m_list(max_tokens: int, n: int, num_sms: int) -> tuple[int, ...]:
    """vLLM's list for a dense GEMM of width ``n``: small M, block multiples, wave boundaries."""
    found = {1, 2, 4, *range(8, 65, 8)}
    for block_m in _RELAX_BLOCK_MS:
        found.update(range(block_m, max_tokens + 1, block_m))
        for block_n in range(16, min(256, n) + 1, 16):
            columns = ceil_div(n, block_n)
            waves = range(1, _RELAX_WAVES + 1)
            found.update(wave * num_sms * block_m // columns for wave in waves)
    return tuple(sorted(m for m in found if 1 <= m <= max_tokens))


def relaxed_ms(shape: GemmShape, ms: Sequence[int], max_tokens: int) -> Sequence[int]:
    """What vLLM's ``relax`` walks: all ``ms`` if contiguous, :func:`relax_m_list` if dense."""
    if shape.type is T.GROUPED_GEMM_NT_F8F8BF16_CONTIG:
        return ms
    if shape.type is T.GEMM_NT_F8F8BF16:
        return relax_m_list(max_tokens, shape.n, shape.num_sms)
    return ()


# -- the execution hook ---------------------------------------------------------------------------


@dataclass
class ExecutionHook:
    """Decides what to walk before a call: the whole M list at a key's first call with M > 0.

    A key is (type, n, k, num_groups), as upstream. Contiguous GEMMs are walked only with M that are
    multiples of their alignment. The hyper-connection GEMM's kernel depends on its number of
    splits, so its first call walks one M for each number of splits that occurs in the list's range.

    Attributes:
        m_list: M to walk; None walks nothing.
        is_node_leader: whether this is the first rank of its node; other ranks walk nothing.
        budget: returns the bytes of GPU memory that a walk may use; called before each walk.
        warn: called with one line of text when lack of memory cuts a list short.
        least: the smallest budget so far.
    """

    m_list: Sequence[int] | None = None
    is_node_leader: bool = True
    budget: Callable[[], float] = lambda: inf
    warn: Callable[[str], None] = lambda line: None
    least: float = inf
    _seen: set[tuple[T, int, int, int]] = field(default_factory=set, repr=False)

    def before(self, call: KernelCall) -> tuple[Walk, ...]:
        """Walks to make before ``call``; only a key's first call on a node leader has any."""
        if self.m_list is None or not self.is_node_leader:
            return ()
        if call.type not in HOOKED_TYPES or call.m < 1:
            return ()
        by_splits = call.type is T.TF32_HC_PRENORM_GEMM
        key = (call.type, call.n, call.k, 0 if by_splits else call.num_groups)
        if key in self._seen:
            return ()
        self._seen.add(key)
        if by_splits:
            return tuple(
                Walk(GemmShape(call.type, call.n, call.k, splits, call.num_sms), ((m, m, 1),))
                for splits, m in _first_m_of_splits(call.k, call.num_sms, self.m_list[-1])
            )
        ms = _aligned(self.m_list) if call.type in CONTIGUOUS_TYPES else self.m_list
        budget = self.budget()
        self.least = min(self.least, budget)
        ms = truncate_to_memory(call.shape, ms, budget, self.warn)
        return (Walk(call.shape, steps_of(ms)),) if ms else ()


@lru_cache(maxsize=32)
def _aligned(ms: Sequence[int]) -> tuple[int, ...]:
    return tuple(m for m in ms if m % CONTIGUOUS_M_ALIGNMENT == 0)


@lru_cache(maxsize=256)
def _first_m_of_splits(k: int, num_sms: int, most: int) -> tuple[tuple[int, int], ...]:
    """(number of splits, first M with that number), for M up to ``most``."""
    found: dict[int, int] = {}
    for m in range(1, most + 1, HC_BLOCK):
        found.setdefault(hc_num_splits(m, k, num_sms), m)
    return tuple(found.items())


def truncate_to_memory(
    shape: GemmShape, ms: Sequence[int], budget: float, warn: Callable[[str], None]
) -> Sequence[int]:
    """The list without the M whose buffers do not fit into ``budget`` bytes.

    As upstream, the largest M is halved while it does not fit and is above 2048; from there down,
    the walk is tried anyway.
    """
    if not ms:
        return ms
    most = ms[-1]
    needed = walk_bytes(shape, most)
    while walk_bytes(shape, most) > budget and most > _LEAST_HALVED:
        most //= 2
    if needed > budget:
        warn(
            f"a walk of {shape.describe()} needs {needed / GIB:.1f} GiB of GPU memory, but "
            f"{budget / GIB:.1f} GiB are free: its largest M is {most} instead of {ms[-1]}"
        )
    return ms[: bisect_right(ms, most)]


# -- memory of a walk -----------------------------------------------------------------------------


def walk_bytes(shape: GemmShape, max_m: int) -> int:
    """Bytes of the buffers for calls with up to ``max_m`` rows.

    Follows SGLang's ``get_memory_requirement`` for Hopper, where the FP32 scales stay alive while
    the library copies them to its own layout. That release does not walk the hyper-connection GEMM,
    so its figure is computed from its operands.

    Raises:
        KeyError: no warm-up walks this type.
    """
    return _BYTES[shape.type](max_m, shape.n, shape.k, shape.num_groups)


def _lhs_fp8(m: int, k: int) -> int:
    """Activations, their FP32 scales, and the library's column-major, aligned copy of these."""
    return m * k + 4 * (m + align(m, 4)) * ceil_div(k, FP8_BLOCK)


def _rhs_fp8(n: int, k: int) -> int:
    return n * k + 4 * ceil_div(n, FP8_BLOCK) * ceil_div(k, FP8_BLOCK)


_BYTES: dict[T, Callable[[int, int, int, int], int]] = {
    T.GEMM_NT_F8F8BF16: lambda m, n, k, _: _lhs_fp8(m, k) + _rhs_fp8(n, k) + 2 * m * n,
    T.GROUPED_GEMM_NT_F8F8BF16_CONTIG: lambda m, n, k, groups: (
        _lhs_fp8(m, k) + groups * _rhs_fp8(n, k) + 4 * m + 2 * m * n
    ),
    T.GROUPED_GEMM_NT_F8F8BF16_MASKED: lambda m, n, k, groups: (
        groups * (_lhs_fp8(m, k) + _rhs_fp8(n, k) + 2 * m * n + 4)
    ),
    T.GEMM_NT_BF16BF16F32: lambda m, n, k, _: 2 * (m * k + n * k) + 4 * m * n,
    T.GROUPED_GEMM_NT_BF16_CONTIG: lambda m, n, k, groups: (
        2 * m * k + 2 * groups * n * k + 4 * m + 2 * m * n
    ),
    T.GROUPED_GEMM_NT_BF16_MASKED: lambda m, n, k, groups: (
        groups * (2 * (m * k + n * k + m * n) + 4)
    ),
    T.TF32_HC_PRENORM_GEMM: lambda m, n, k, splits: (
        2 * m * k + 4 * n * k + 4 * max(1, splits) * m * (n + 1)
    ),
}

HOOKED_TYPES = frozenset(_BYTES)
"""Types that SGLang's warm-ups walk; einsum, logits and metadata kernels compile at first use."""
