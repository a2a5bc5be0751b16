"""Kernel types of the DeepGEMM wrapper, and values that describe a call by its shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import lru_cache


class DeepGemmKernelType(IntEnum):
    """Wrapper entry points, named as in SGLang; in lower case they are the wrapper's functions.

    ``GEMM_NT_BF16BF16BF16`` is ``deep_gemm.bf16_gemm_nt`` with BF16 output; SGLang uses cuBLAS for
    it. Only newer libraries have the last four: weights in blocks of 32 x 32 (recipe (1, 32, 32)),
    and, only on Blackwell, FP4 weights with one scale per 32 values.
    """

    GEMM_NT_F8F8BF16 = auto()
    GROUPED_GEMM_NT_F8F8BF16_CONTIG = auto()
    GROUPED_GEMM_NT_F8F8BF16_MASKED = auto()
    GEMM_NT_BF16BF16F32 = auto()
    GEMM_NT_BF16BF16BF16 = auto()
    GROUPED_GEMM_NT_BF16_CONTIG = auto()
    GROUPED_GEMM_NT_BF16_MASKED = auto()
    TF32_HC_PRENORM_GEMM = auto()
    FP8_EINSUM_BHR_HDR_BHD = auto()
    FP8_MQA_LOGITS = auto()
    PAGED_MQA_LOGITS_METADATA = auto()
    FP8_PAGED_MQA_LOGITS = auto()
    GEMM_NT_F8F8BF16_BLOCK32 = auto()
    GEMM_NT_F8F4BF16 = auto()
    GROUPED_GEMM_NT_F8F4BF16_CONTIG = auto()
    GROUPED_GEMM_NT_F8F4BF16_MASKED = auto()


MASKED_TYPES = frozenset(
    {
        DeepGemmKernelType.GROUPED_GEMM_NT_F8F8BF16_MASKED,
        DeepGemmKernelType.GROUPED_GEMM_NT_BF16_MASKED,
        DeepGemmKernelType.GROUPED_GEMM_NT_F8F4BF16_MASKED,
    }
)
CONTIGUOUS_TYPES = frozenset(
    {
        DeepGemmKernelType.GROUPED_GEMM_NT_F8F8BF16_CONTIG,
        DeepGemmKernelType.GROUPED_GEMM_NT_BF16_CONTIG,
        DeepGemmKernelType.GROUPED_GEMM_NT_F8F4BF16_CONTIG,
    }
)


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One call of a wrapper entry point, by shape.

    ``m``, ``n``, ``k`` follow ``D[m, n] = A[m, k] @ B[n, k].T``; ``num_groups`` is the number of
    expert groups (grouped types), of head groups (einsum) or of splits (``TF32_HC_PRENORM_GEMM``;
    0 means none). For the masked types ``m`` is the expected M per group. For the MQA-logits types
    ``m`` counts queries, ``n`` heads, and ``k`` is the head dimension. ``num_sms`` is the number
    of SMs that the kernel may use.
    """

    type: DeepGemmKernelType
    m: int
    n: int
    k: int
    num_groups: int
    num_sms: int

    @property
    def shape(self) -> GemmShape:
        """The call without M."""
        return GemmShape(self.type, self.n, self.k, self.num_groups, self.num_sms)

    def describe(self) -> str:
        """Short text for tables and traces."""
        groups = f" g{self.num_groups}" if self.num_groups > 1 else ""
        return f"{self.type.name.lower()} m{self.m} n{self.n} k{self.k}{groups}"


@dataclass(frozen=True, slots=True, order=True)
class GemmShape:
    """A wrapper entry point and its sizes, without M; fields as in :class:`KernelCall`."""

    type: DeepGemmKernelType
    n: int
    k: int
    num_groups: int
    num_sms: int

    @property
    def m_step(self) -> int:
        """The step between values of M with which it can be called."""
        return CONTIGUOUS_M_ALIGNMENT if self.type in CONTIGUOUS_TYPES else 1

    def call(self, m: int) -> KernelCall:
        """The call with ``m`` rows."""
        return KernelCall(self.type, m, self.n, self.k, self.num_groups, self.num_sms)

    def describe(self) -> str:
        """``type:N:K[:GROUPS]``, the format of ``runner plan --gemm``."""
        always = self.type is DeepGemmKernelType.TF32_HC_PRENORM_GEMM
        groups = f":{self.num_groups}" if always or self.num_groups > 1 else ""
        return f"{self.type.name.lower()}:{self.n}:{self.k}{groups}"


CONTIGUOUS_M_ALIGNMENT = 128
"""Rows of an expert in the contiguous layout are padded to a multiple of this."""

MSteps = tuple[tuple[int, int, int], ...]
"""Ascending M as (first, last, step) runs."""


def steps_of(values: Sequence[int]) -> MSteps:
    """Compress ascending values into few runs of equal steps; :func:`expand` is the inverse."""
    if isinstance(values, range):
        return ((values[0], values[-1], values.step),) if values else ()
    return _steps_of(tuple(values))


@lru_cache(maxsize=256)
def _steps_of(values: tuple[int, ...]) -> MSteps:
    runs: list[tuple[int, int, int]] = []
    for value in values:
        if runs:
            first, last, step = runs[-1]
            if first == last or value - last == step:
                runs[-1] = (first, value, value - last)
                continue
        runs.append((value, value, 1))
    return tuple(runs)


def expand(steps: MSteps) -> Sequence[int]:
    """The values in the runs, ascending."""
    if len(steps) == 1:
        ((first, last, step),) = steps
        return range(first, last + 1, step)
    return [m for first, last, step in steps for m in range(first, last + 1, step)]
