"""Walks over M lists: upstream's execution hook, and what it walks before a GEMM's first call.

Source: SGLang 0.5.23 ``deep_gemm_wrapper/compile_utils.py``. The hook sits where both interpreters
pass, so that a recorded Schedule holds the walks that a real run makes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf

from runner.backend.m_lists import multiples_of, relax_m_list, steps_of
from runner.backend.token_to_m import hc_num_splits
from runner.backend.walk_memory import GIB, walk_bytes
from runner.kernels.heuristics_sm90 import CONTIGUOUS_M_ALIGNMENT
from runner.kernels.types import CONTIGUOUS_TYPES, GemmShape, KernelCall
from runner.kernels.types import DeepGemmKernelType as T
from runner.schedule import Walk

HOOKED_TYPES = frozenset(
    {
        T.GEMM_NT_F8F8BF16,
        T.GROUPED_GEMM_NT_F8F8BF16_CONTIG,
        T.GROUPED_GEMM_NT_F8F8BF16_MASKED,
        T.GEMM_NT_BF16BF16F32,
        T.GROUPED_GEMM_NT_BF16_CONTIG,
        T.GROUPED_GEMM_NT_BF16_MASKED,
        T.TF32_HC_PRENORM_GEMM,
    }
)
"""Types that SGLang's warm-ups walk; einsum, logits and metadata compile at first use."""

_LEAST_HALVED = 2048


@dataclass
class ExecutionHook:
    """Tells what to walk before a call: the whole M list, at a key's first call with M > 0.

    A key is (type, n, k, num_groups), as upstream keys it. Contiguous GEMMs are walked only with
    multiples of their alignment. The hyper-connection GEMM's kernel follows from its number of
    splits, so its first call walks one M for each number that M up to the list's end ask for.

    Attributes:
        m_list: M to walk, None where nothing is walked.
        leads: whether this is the first rank of its node; the others walk nothing.
        budget: bytes of GPU memory that a walk may take, asked before each walk.
        warn: told where the list is cut short for lack of memory.
    """

    m_list: Sequence[int] | None = None
    leads: bool = True
    budget: Callable[[], float] = lambda: inf
    warn: Callable[[str], None] = lambda line: None
    _seen: set[tuple[T, int, int, int]] = field(default_factory=set, repr=False)

    def before(self, call: KernelCall) -> tuple[Walk, ...]:
        """Walks to make before ``call``; empty but for a key's first call on a leading rank."""
        if self.m_list is None or not self.leads or call.type not in HOOKED_TYPES or call.m < 1:
            return ()
        splits = call.type is T.TF32_HC_PRENORM_GEMM
        key = (call.type, call.n, call.k, 0 if splits else call.num_groups)
        if key in self._seen:
            return ()
        self._seen.add(key)
        if splits:
            return tuple(_split_walks(call, self.m_list[-1]))
        shape = GemmShape(call.type, call.n, call.k, call.num_groups, call.num_sms)
        ms = fitted(shape, walk_list(shape, self.m_list), self.budget(), self.warn)
        return (Walk(shape, steps_of(ms)),) if ms else ()


def _split_walks(call: KernelCall, most: int) -> Iterator[Walk]:
    """One call for each number of splits."""
    for m, splits in _first_m_of_splits(call.k, call.num_sms, most):
        shape = GemmShape(call.type, call.n, call.k, splits, call.num_sms)
        yield Walk(shape, ((m, m, 1),))


@lru_cache(maxsize=256)
def _first_m_of_splits(k: int, num_sms: int, most: int) -> tuple[tuple[int, int], ...]:
    """(first M, number of splits), as M grows to ``most``."""
    found: dict[int, int] = {}
    for m in range(1, most + 1):
        found.setdefault(hc_num_splits(m, k, num_sms), m)
    return tuple((m, splits) for splits, m in found.items())


def walk_list(shape: GemmShape, m_list: Sequence[int]) -> Sequence[int]:
    """The part of a list that a GEMM can be called with."""
    if shape.type in CONTIGUOUS_TYPES:
        return multiples_of(m_list, CONTIGUOUS_M_ALIGNMENT)
    return m_list


def relaxed_ms(shape: GemmShape, ms: Sequence[int], max_tokens: int) -> Sequence[int]:
    """M that vLLM's ``relax`` walks: all of a contiguous GEMM's, a dense one's wave boundaries."""
    if shape.type is T.GROUPED_GEMM_NT_F8F8BF16_CONTIG:
        return ms
    if shape.type is T.GEMM_NT_F8F8BF16:
        return relax_m_list(max_tokens, shape.n, shape.num_sms)
    return ()


def fitted(
    shape: GemmShape, ms: Sequence[int], budget: float, warn: Callable[[str], None]
) -> Sequence[int]:
    """The list without the M whose buffers do not fit ``budget`` bytes.

    As upstream: the largest M halves while it does not fit and is above 2048; below that the walk
    is tried all the same.
    """
    if not ms:
        return ms
    most = ms[-1]
    wanted = walk_bytes(shape, most)
    while walk_bytes(shape, most) > budget and most > _LEAST_HALVED:
        most //= 2
    if wanted > budget:
        warn(
            f"a walk of {shape.describe()} wants {wanted / GIB:.1f} GiB of GPU memory and "
            f"{budget / GIB:.1f} are free: its largest M is {most} instead of {ms[-1]}"
        )
    return ms[: bisect_right(ms, most)]
