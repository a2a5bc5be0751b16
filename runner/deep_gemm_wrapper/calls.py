"""Calls of each entry point on a GPU: buffers once, then any number of rows of them.

Each maker allocates the buffers of the largest M and returns a function that calls the entry point
with the first ``m`` rows of them. Only the shapes matter: all values are zero, and all scales one,
so that a wrapper that checks scales takes them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from runner.backend.reference import pack_pages
from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape

Call = Callable[[int], None]

_FP8 = torch.float8_e4m3fn
_FP8_RECIPE, _FP4_RECIPE = (1, 128), (1, 32)
"""Rows and columns that share a scale: of activations, and of FP4 weights."""

MASKED_ROWS = 128
"""Rows of a group where the M of a masked GEMM does not say."""

_PAGE = 64
_ENTRIES = 256


def _zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, device="cuda", dtype=dtype)


def _ones(*shape: int) -> torch.Tensor:
    """Scales."""
    return torch.ones(shape, device="cuda", dtype=torch.float32)


def _fp8_rows(*shape: int, scaled: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations with row-major scales, one per ``scaled`` values."""
    scales = _ones(*shape[:-1], -(-shape[-1] // scaled))
    return _zeros(*shape, dtype=_FP8), scales


def _fp8_blocks(*shape: int, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with one scale per ``block`` x ``block`` values."""
    blocks = (-(-shape[-2] // block), -(-shape[-1] // block))
    return _zeros(*shape, dtype=_FP8), _ones(*shape[:-2], *blocks)


def _dense_fp8(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    (values, scales), weight = _fp8_rows(most, shape.k), _fp8_blocks(shape.n, shape.k)
    out = _zeros(most, shape.n, dtype=torch.bfloat16)
    return lambda m: wrapper.gemm_nt_f8f8bf16((values[:m], scales[:m]), weight, out[:m])


def _contiguous_fp8(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    values, scales = _fp8_rows(most, shape.k)
    weight = _fp8_blocks(shape.num_groups, shape.n, shape.k)
    out = _zeros(most, shape.n, dtype=torch.bfloat16)
    groups = _zeros(most, dtype=torch.int32)
    return lambda m: wrapper.grouped_gemm_nt_f8f8bf16_contig(
        (values[:m], scales[:m]), weight, out[:m], groups[:m]
    )


def _masked_fp8(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    rows = _fp8_rows(shape.num_groups, most, shape.k)
    weight = _fp8_blocks(shape.num_groups, shape.n, shape.k)
    out = _zeros(shape.num_groups, most, shape.n, dtype=torch.bfloat16)
    used = _zeros(shape.num_groups, dtype=torch.int32)
    return lambda m: wrapper.grouped_gemm_nt_f8f8bf16_masked(rows, weight, out, used, m)


def _dense_block32(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    values, scales = _fp8_rows(most, shape.k, scaled=32)
    weight = _fp8_blocks(shape.n, shape.k, block=32)
    out = _zeros(most, shape.n, dtype=torch.bfloat16)
    gemm = wrapper.library.fp8_gemm_nt
    return lambda m: gemm((values[:m], scales[:m]), weight, out[:m], recipe=(1, 32, 32))


def _dense_fp4(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    values = _zeros(most, shape.k, dtype=_FP8)
    weight, out = _fp4_weight(shape.n, shape.k), _zeros(most, shape.n, dtype=torch.bfloat16)
    gemm = wrapper.library.fp8_fp4_gemm_nt

    def call(m: int) -> None:
        lhs = values[:m], _packed_scales(m, shape.k, scaled=128)
        gemm(lhs, weight, out[:m], recipe_a=_FP8_RECIPE, recipe_b=_FP4_RECIPE)

    return call


def _contiguous_fp4(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    values = _zeros(most, shape.k, dtype=_FP8)
    weight = _fp4_weight(shape.num_groups, shape.n, shape.k)
    out, groups = _zeros(most, shape.n, dtype=torch.bfloat16), _zeros(most, dtype=torch.int32)
    gemm = wrapper.library.m_grouped_fp8_fp4_gemm_nt_contiguous

    def call(m: int) -> None:
        lhs = values[:m], _packed_scales(m, shape.k, scaled=128)
        gemm(lhs, weight, out[:m], groups[:m], recipe_a=_FP8_RECIPE, recipe_b=_FP4_RECIPE)

    return call


def _masked_fp4(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    rows = (
        _zeros(shape.num_groups, most, shape.k, dtype=_FP8),
        _packed_scales(shape.num_groups, most, shape.k, scaled=128),
    )
    weight = _fp4_weight(shape.num_groups, shape.n, shape.k)
    out = _zeros(shape.num_groups, most, shape.n, dtype=torch.bfloat16)
    used = _zeros(shape.num_groups, dtype=torch.int32)
    library = wrapper.library
    older = getattr(library, "fp8_m_grouped_gemm_nt_masked", None)
    gemm = older or library.m_grouped_fp8_fp4_gemm_nt_masked
    return lambda m: gemm(rows, weight, out, used, m, recipe_a=_FP8_RECIPE, recipe_b=_FP4_RECIPE)


def _fp4_weight(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of two FP4 values a byte, with a packed UE8M0 scale for 32 of them."""
    packed = _zeros(*shape[:-1], shape[-1] // 2, dtype=torch.int8)
    return packed, _packed_scales(*shape, scaled=32)


def _packed_scales(*shape: int, scaled: int) -> torch.Tensor:
    """UE8M0 scales as Blackwell's kernels read them: four in an int32, column by column.

    Columns begin at multiples of four rows, as TMA needs them; ``scaled`` values share a scale.
    """
    *groups, rows, k = shape
    columns, padded = -(-k // (4 * scaled)), -(-rows // 4) * 4
    strides = [columns * padded] * bool(groups) + [1, padded]
    return torch.empty_strided((*groups, rows, columns), strides, device="cuda", dtype=torch.int32)


def _dense_bf16(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    x = _zeros(most, shape.k, dtype=torch.bfloat16)
    weight = _zeros(shape.n, shape.k, dtype=torch.bfloat16)
    wide = shape.type is T.GEMM_NT_BF16BF16F32
    out = _zeros(most, shape.n, dtype=torch.float32 if wide else torch.bfloat16)
    entry = wrapper.gemm_nt_bf16bf16f32 if wide else wrapper.gemm_nt_bf16bf16bf16
    return lambda m: entry(x[:m], weight, out[:m])


def _contiguous_bf16(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    x = _zeros(most, shape.k, dtype=torch.bfloat16)
    weight = _zeros(shape.num_groups, shape.n, shape.k, dtype=torch.bfloat16)
    out = _zeros(most, shape.n, dtype=torch.bfloat16)
    groups = _zeros(most, dtype=torch.int32)
    return lambda m: wrapper.grouped_gemm_nt_bf16_contig(x[:m], weight, out[:m], groups[:m])


def _masked_bf16(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    x = _zeros(shape.num_groups, most, shape.k, dtype=torch.bfloat16)
    weight = _zeros(shape.num_groups, shape.n, shape.k, dtype=torch.bfloat16)
    out = _zeros(shape.num_groups, most, shape.n, dtype=torch.bfloat16)
    used = _zeros(shape.num_groups, dtype=torch.int32)
    return lambda m: wrapper.grouped_gemm_nt_bf16_masked(x, weight, out, used, m)


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
    if _wants_mx(wrapper, "fp8_mqa_logits"):
        q, q_scales = _mx_rows(most, shape.n, shape.k)
        keys_mx = _mx_rows(_ENTRIES, shape.k)
        weights = weights.bfloat16()
        mqa = wrapper.library.fp8_fp4_mqa_logits
        return lambda m: mqa(
            (q[:m], q_scales[:m]), keys_mx, weights[:m], start[:m], end[:m], _ENTRIES
        )
    q = _zeros(most, shape.n, shape.k, dtype=_FP8)
    keys = (_zeros(_ENTRIES, shape.k, dtype=_FP8), _ones(_ENTRIES))

    def call(m: int) -> None:
        wrapper.fp8_mqa_logits(q[:m], keys, weights[:m], start[:m], end[:m], _ENTRIES)

    return call


def _metadata(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    lens = _zeros(most, 1, dtype=torch.int32) + 1
    if _wants_mx(wrapper, "fp8_paged_mqa_logits"):
        rows = _zeros(most, dtype=torch.int32)
        metadata = wrapper.library.get_paged_mqa_logits_metadata
        return lambda m: metadata(lens[:m], _PAGE, shape.num_sms, indices=rows[:m])

    def call(m: int) -> None:
        wrapper.get_paged_mqa_logits_metadata(lens[:m], _PAGE, shape.num_sms)

    return call


def _paged_mqa_logits(wrapper: DeepGemmWrapper, shape: GemmShape, most: int) -> Call:
    weights = _zeros(most, shape.n, dtype=torch.float32)
    lens = _zeros(most, 1, dtype=torch.int32) + 1
    pages = pack_pages(_zeros(_ENTRIES, shape.k, dtype=_FP8), _ones(_ENTRIES))
    table = _zeros(most, _ENTRIES // _PAGE, dtype=torch.int32)
    # Zeroed metadata: each SM starts where it ends and computes nothing.
    schedule = _zeros(shape.num_sms + 1, 2, dtype=torch.int32)
    if _wants_mx(wrapper, "fp8_paged_mqa_logits"):
        q_mx, q_scales = _mx_rows(most, 1, shape.n, shape.k)
        weights, rows = weights.bfloat16(), _zeros(most, dtype=torch.int32)
        paged = wrapper.library.fp8_fp4_paged_mqa_logits

        def call_mx(m: int) -> None:
            q_pair = (q_mx[:m], q_scales[:m])
            rest = (pages, weights[:m], lens[:m], table[:m], schedule, _ENTRIES)
            paged(q_pair, *rest, indices=rows[:m])

        return call_mx
    q = _zeros(most, 1, shape.n, shape.k, dtype=_FP8)

    def call(m: int) -> None:
        wrapper.fp8_paged_mqa_logits(
            q[:m], pages, weights[:m], lens[:m], table[:m], schedule, _ENTRIES
        )

    return call


def _wants_mx(wrapper: DeepGemmWrapper, older_name: str) -> bool:
    """Whether logits take MX scales: on SM100, where the library has no older entry point."""
    return not hasattr(wrapper.library, older_name) and _on_sm100()


def _on_sm100() -> bool:
    return torch.cuda.get_device_capability()[0] == 10


def _mx_rows(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 rows, and for each row its packed UE8M0 scales: four bytes in one int32."""
    return _zeros(*shape, dtype=_FP8), _zeros(*shape[:-1], dtype=torch.int32)


MAKERS: dict[T, Callable[[DeepGemmWrapper, GemmShape, int], Call]] = {
    T.GEMM_NT_F8F8BF16: _dense_fp8,
    T.GROUPED_GEMM_NT_F8F8BF16_CONTIG: _contiguous_fp8,
    T.GROUPED_GEMM_NT_F8F8BF16_MASKED: _masked_fp8,
    T.GEMM_NT_BF16BF16F32: _dense_bf16,
    T.GEMM_NT_BF16BF16BF16: _dense_bf16,
    T.GROUPED_GEMM_NT_BF16_CONTIG: _contiguous_bf16,
    T.GROUPED_GEMM_NT_BF16_MASKED: _masked_bf16,
    T.TF32_HC_PRENORM_GEMM: _hc_prenorm,
    T.FP8_EINSUM_BHR_HDR_BHD: _einsum_fp8,
    T.FP8_MQA_LOGITS: _mqa_logits,
    T.PAGED_MQA_LOGITS_METADATA: _metadata,
    T.FP8_PAGED_MQA_LOGITS: _paged_mqa_logits,
    T.GEMM_NT_F8F8BF16_BLOCK32: _dense_block32,
    T.GEMM_NT_F8F4BF16: _dense_fp4,
    T.GROUPED_GEMM_NT_F8F4BF16_CONTIG: _contiguous_fp4,
    T.GROUPED_GEMM_NT_F8F4BF16_MASKED: _masked_fp4,
}
