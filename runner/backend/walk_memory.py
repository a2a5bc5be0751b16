"""GPU memory that a walk of a GEMM takes: the buffers of its largest M.

Source: ``_BaseWarmupExecutor.get_memory_requirement`` of SGLang 0.5.23 for Hopper, where FP32
scales stay alive while the library brings them into its own layout; the hyper-connection GEMM,
which that release does not walk, follows from its operands.
"""

from __future__ import annotations

from collections.abc import Callable

from runner.kernels.heuristics_sm90 import align, ceil_div
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape

GIB = 1 << 30
_BLOCK = 128


def walk_bytes(shape: GemmShape, max_m: int) -> int:
    """Bytes of the buffers for calls with up to ``max_m`` rows.

    Raises:
        KeyError: a type that no warm-up walks.
    """
    return _BYTES[shape.type](max_m, shape.n, shape.k, shape.num_groups)


def _lhs_scales(m: int, k: int) -> int:
    """FP32 scales of activations and the library's copy of them, column-major and aligned."""
    return 4 * (m + align(m, 4)) * ceil_div(k, _BLOCK)


def _rhs_scales(n: int, k: int) -> int:
    return 4 * ceil_div(n, _BLOCK) * ceil_div(k, _BLOCK)


def _dense_fp8(m: int, n: int, k: int, groups: int) -> int:
    return m * k + n * k + 2 * m * n + _lhs_scales(m, k) + _rhs_scales(n, k)


def _contiguous_fp8(m: int, n: int, k: int, groups: int) -> int:
    weights = groups * (n * k + _rhs_scales(n, k))
    return m * k + weights + 4 * m + 2 * m * n + _lhs_scales(m, k)


def _masked_fp8(m: int, n: int, k: int, groups: int) -> int:
    return groups * (_dense_fp8(m, n, k, 1) + 4)


def _dense_bf16(m: int, n: int, k: int, groups: int) -> int:
    return 2 * (m * k + n * k) + 4 * m * n


def _contiguous_bf16(m: int, n: int, k: int, groups: int) -> int:
    return 2 * m * k + 2 * groups * n * k + 4 * m + 2 * m * n


def _masked_bf16(m: int, n: int, k: int, groups: int) -> int:
    return groups * (2 * m * k + 2 * n * k + 4 + 2 * m * n)


def _hc_prenorm(m: int, n: int, k: int, splits: int) -> int:
    return 2 * m * k + 4 * n * k + 4 * max(1, splits) * m * (n + 1)


_BYTES: dict[T, Callable[[int, int, int, int], int]] = {
    T.GEMM_NT_F8F8BF16: _dense_fp8,
    T.GROUPED_GEMM_NT_F8F8BF16_CONTIG: _contiguous_fp8,
    T.GROUPED_GEMM_NT_F8F8BF16_MASKED: _masked_fp8,
    T.GEMM_NT_BF16BF16F32: _dense_bf16,
    T.GROUPED_GEMM_NT_BF16_CONTIG: _contiguous_bf16,
    T.GROUPED_GEMM_NT_BF16_MASKED: _masked_bf16,
    T.TF32_HC_PRENORM_GEMM: _hc_prenorm,
}
