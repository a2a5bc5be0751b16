"""Calls to each entry point on a GPU: allocate buffers once, then call with any number of rows.

:func:`make_call` allocates buffers for the largest M and returns a function that calls the entry
point with their first ``m`` rows. Only the shapes matter: all values are 0, and all scales are 1,
so that they pass the scale check.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper, library_function
from runner.deep_gemm_wrapper.quantise import PAGE, pack_pages
from runner.kernels.heuristics_sm90 import align, ceil_div
from runner.kernels.types import CONTIGUOUS_TYPES, MASKED_TYPES, GemmShape
from runner.kernels.types import DeepGemmKernelType as T

Call = Callable[[int], object]
Pair = tuple[Tensor, Tensor]
Operand = Tensor | Pair


MASKED_ROWS = 128
"""Default rows per group of a masked GEMM, whose M does not determine them."""

_ENTRIES = 256
_FP8 = torch.float8_e4m3fn


def make_call(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    """A function that calls the GEMM with the first ``m`` of ``most`` rows of its buffers.

    A masked GEMM has ``most`` rows in each group, whatever ``m`` is.
    """
    return _OTHERS.get(shape.type, _gemm)(wrapper, shape, most)


def _gemm(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    """A GEMM: dense, contiguous with each row's group, or masked with each group's row count."""
    kind, n, k = shape.type, shape.n, shape.k
    masked, contiguous = kind in MASKED_TYPES, kind in CONTIGUOUS_TYPES
    groups = (shape.num_groups,) if masked or contiguous else ()
    rows = (*groups, most) if masked else (most,)
    entry = partial(library_function(wrapper.library, kind), **_RECIPES.get(kind, {}))
    lhs, rhs = _activations(kind, *rows, k), _weight(kind, *groups, n, k)
    wide = kind is T.GEMM_NT_BF16BF16F32
    out = _zeros(*rows, n, dtype=torch.float32 if wide else torch.bfloat16)
    if masked:
        used, every = _zeros(*groups, dtype=torch.int32), lhs(None)
        return lambda m: entry(every, rhs, out, used, m)
    if contiguous:
        indices = _zeros(most, dtype=torch.int32)
        return lambda m: entry(lhs(m), rhs, out[:m], indices[:m])
    return lambda m: entry(lhs(m), rhs, out[:m])


def _activations(kind: T, *shape: int) -> Callable[[int | None], Operand]:
    """A function that returns the first ``m`` rows; None returns all rows."""
    if _is_bf16(kind):
        x = _zeros(*shape, dtype=torch.bfloat16)
        return lambda m: x[:m]
    values, scales = _fp8_rows(*shape, scaled=_scaled(kind))
    if kind not in FP4_TYPES:
        return lambda m: (values[:m], scales[:m])
    *rows, k = shape
    return lambda m: (values[:m], _packed_scales(*(rows if m is None else (m,)), k, scaled=128))


def _weight(kind: T, *shape: int) -> Operand:
    if kind in FP4_TYPES:  # Two values per byte, and one scale per 32 values.
        packed = _zeros(*shape[:-1], shape[-1] // 2, dtype=torch.int8)
        return packed, _packed_scales(*shape, scaled=32)
    if _is_bf16(kind):
        return _zeros(*shape, dtype=torch.bfloat16)
    return _fp8_blocks(*shape, block=_scaled(kind))


def _is_bf16(kind: T) -> bool:
    return "_NT_BF16" in kind.name


def _scaled(kind: T) -> int:
    return 32 if kind is T.GEMM_NT_F8F8BF16_BLOCK32 else 128


FP4_TYPES = {kind for kind in T if "F8F4" in kind.name}
_RECIPES: dict[T, dict[str, tuple[int, ...]]] = {
    T.GEMM_NT_F8F8BF16_BLOCK32: {"recipe": (1, 32, 32)},
    **{kind: {"recipe_a": (1, 128), "recipe_b": (1, 32)} for kind in FP4_TYPES},
}


# -- entry points other than plain GEMMs ----------------------------------------------------------


def _hc_prenorm(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    x = _zeros(most, shape.k, dtype=torch.bfloat16)
    fn = _zeros(shape.n, shape.k, dtype=torch.float32)
    splits = max(1, shape.num_groups)

    def call(m: int) -> None:
        out = torch.empty((splits, m, shape.n), device="cuda")
        squares = torch.empty((splits, m), device="cuda")
        wrapper.tf32_hc_prenorm_gemm(x[:m], fn, out, squares, splits)

    return call


def _einsum_fp8(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    values, scales = _fp8_rows(most, shape.num_groups, shape.k)
    weight = _fp8_blocks(shape.num_groups, shape.n, shape.k)
    out = _zeros(most, shape.num_groups, shape.n, dtype=torch.bfloat16)
    return lambda m: wrapper.fp8_einsum_bhr_hdr_bhd((values[:m], scales[:m]), weight, out[:m])


def _mqa_logits(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    weights = _zeros(most, shape.n, dtype=torch.float32)
    start = _zeros(most, dtype=torch.int32)
    end = start + _ENTRIES
    if _takes_mx(wrapper, "fp8_mqa_logits"):
        q, q_scales = _mx_rows(most, shape.n, shape.k)
        keys_mx = _mx_rows(_ENTRIES, shape.k)
        weights = weights.bfloat16()
        mqa = wrapper.library.fp8_fp4_mqa_logits
        return lambda m: mqa(
            (q[:m], q_scales[:m]), keys_mx, weights[:m], start[:m], end[:m], _ENTRIES
        )
    q = _zeros(most, shape.n, shape.k, dtype=_FP8)
    keys = (_zeros(_ENTRIES, shape.k, dtype=_FP8), _ones(_ENTRIES))
    return lambda m: wrapper.fp8_mqa_logits(q[:m], keys, weights[:m], start[:m], end[:m], _ENTRIES)


def _metadata(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    lens = _zeros(most, 1, dtype=torch.int32) + 1
    if _takes_mx(wrapper, "fp8_paged_mqa_logits"):
        rows = _zeros(most, dtype=torch.int32)
        metadata = wrapper.library.get_paged_mqa_logits_metadata
        return lambda m: metadata(lens[:m], PAGE, shape.num_sms, indices=rows[:m])
    return lambda m: wrapper.get_paged_mqa_logits_metadata(lens[:m], PAGE, shape.num_sms)


def _paged_mqa_logits(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    weights = _zeros(most, shape.n, dtype=torch.float32)
    lens = _zeros(most, 1, dtype=torch.int32) + 1
    pages = pack_pages(_zeros(_ENTRIES, shape.k, dtype=_FP8), _ones(_ENTRIES))
    table = _zeros(most, _ENTRIES // PAGE, dtype=torch.int32)
    # With metadata of zeros, each SM starts at its end and computes nothing.
    schedule = _zeros(shape.num_sms + 1, 2, dtype=torch.int32)
    if _takes_mx(wrapper, "fp8_paged_mqa_logits"):
        q, q_scales = _mx_rows(most, 1, shape.n, shape.k)
        narrow, rows = weights.bfloat16(), _zeros(most, dtype=torch.int32)
        paged = wrapper.library.fp8_fp4_paged_mqa_logits

        def call_mx(m: int) -> None:
            rest = (pages, narrow[:m], lens[:m], table[:m], schedule, _ENTRIES)
            paged((q[:m], q_scales[:m]), *rest, indices=rows[:m])

        return call_mx
    q = _zeros(most, 1, shape.n, shape.k, dtype=_FP8)
    return lambda m: wrapper.fp8_paged_mqa_logits(
        q[:m], pages, weights[:m], lens[:m], table[:m], schedule, _ENTRIES
    )


_OTHERS: dict[T, Callable[[DeepGemmWrapper, GemmShape, int], Call]] = {
    T.TF32_HC_PRENORM_GEMM: _hc_prenorm,
    T.FP8_EINSUM_BHR_HDR_BHD: _einsum_fp8,
    T.FP8_MQA_LOGITS: _mqa_logits,
    T.PAGED_MQA_LOGITS_METADATA: _metadata,
    T.FP8_PAGED_MQA_LOGITS: _paged_mqa_logits,
}


def _takes_mx(wrapper: DeepGemmWrapper, older_name: str) -> bool:
    """Whether logits take MX scales: on SM100, if the library lacks the older entry point."""
    return not hasattr(wrapper.library, older_name) and (
        torch.cuda.get_device_capability()[0] == 10
    )


# -- buffers --------------------------------------------------------------------------------------


def _zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, device="cuda", dtype=dtype)


def _ones(*shape: int) -> Tensor:
    """Scales of 1."""
    return torch.ones(shape, device="cuda", dtype=torch.float32)


def _fp8_rows(*shape: int, scaled: int = 128) -> Pair:
    """Activations with row-major scales, one per ``scaled`` values."""
    return _zeros(*shape, dtype=_FP8), _ones(*shape[:-1], ceil_div(shape[-1], scaled))


def _fp8_blocks(*shape: int, block: int = 128) -> Pair:
    """Weights with one scale per ``block`` x ``block`` values."""
    blocks = (ceil_div(shape[-2], block), ceil_div(shape[-1], block))
    return _zeros(*shape, dtype=_FP8), _ones(*shape[:-2], *blocks)


def _mx_rows(*shape: int) -> Pair:
    """FP8 rows, and each row's packed UE8M0 scales: four bytes in one int32."""
    return _zeros(*shape, dtype=_FP8), _zeros(*shape[:-1], dtype=torch.int32)


def _packed_scales(*shape: int, scaled: int) -> Tensor:
    """UE8M0 scales in the layout of Blackwell's kernels: four in an int32, column-major.

    Columns are padded to a multiple of four rows, as TMA requires; ``scaled`` values share a scale.
    """
    *groups, rows, k = shape
    columns, padded = ceil_div(k, 4 * scaled), align(rows, 4)
    strides = [columns * padded] * bool(groups) + [1, padded]
    return torch.empty_strided((*groups, rows, columns), strides, device="cuda", dtype=torch.int32)
