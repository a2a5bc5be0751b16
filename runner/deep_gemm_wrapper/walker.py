"""Call an entry point with every M of a list: what a warm-up walk does, and what proves one.

Each maker allocates the buffers of the largest M once and returns a function that calls the entry
point with the first ``m`` rows of them. Only the shapes matter: all values are zero, and all scales
one, so that a wrapper that checks scales takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from runner.backend.reference import pack_pages
from runner.deep_gemm_wrapper.compile_mode import compile_only
from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper
from runner.jit.plan import Plan
from runner.kernels.kernel import Kernel
from runner.kernels.types import MASKED_TYPES, GemmShape
from runner.kernels.types import DeepGemmKernelType as T
from runner.m_lists import expand
from runner.schedule import Walk

Call = Callable[[int], None]

_FP8 = torch.float8_e4m3fn
_MASKED_ROWS = 128
_PAGE = 64
_ENTRIES = 256


def walk(
    wrapper: DeepGemmWrapper,
    shape: GemmShape,
    ms: Sequence[int],
    after_call: Callable[[int], None] = lambda m: None,
    masked_rows: int = _MASKED_ROWS,
) -> None:
    """Call the GEMM with each of ``ms`` (ascending) and then ``after_call`` with the M.

    A masked GEMM's M is what its groups are expected to hold, not the rows of its buffers, which
    are ``masked_rows`` a group.
    """
    if not ms:
        return
    with wrapper.configure_deep_gemm_num_sms(shape.num_sms), torch.inference_mode():
        most = masked_rows if shape.type in MASKED_TYPES else ms[-1]
        call = _MAKERS[shape.type](wrapper, shape, most)
        for m in ms:
            call(m)
            after_call(m)
        torch.cuda.synchronize()


def walk_list(wrapper: DeepGemmWrapper, op: Walk, library: ModuleType) -> None:
    """A warm-up's walk, with the buffers that upstream's executors have.

    Builds of the library that can compile without launching do that.
    """
    ms = expand(op.steps)
    with compile_only(library):
        walk(wrapper, op.shape, ms, masked_rows=ms[-1])
    torch.cuda.empty_cache()


def call_each(wrapper: DeepGemmWrapper, plan: Plan, kernels: Sequence[Kernel]) -> list[Kernel]:
    """Call each kernel once, at the first M that runs it, so that the library loads it.

    GEMMs whose buffers do not fit the GPU's free memory are left to their first use; returned are
    the kernels that were called.
    """
    wanted, called = set(kernels), []
    calls: dict[GemmShape, dict[int, list[Kernel]]] = {}
    for item in plan.kernels:
        if item.kernel in wanted:
            use = item.uses[0]
            calls.setdefault(use.shape, {}).setdefault(use.m_ranges[0][0], []).append(item.kernel)
    for shape, by_m in calls.items():
        try:
            walk(wrapper, shape, sorted(by_m))
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        called += [kernel for found in by_m.values() for kernel in found]
    torch.cuda.empty_cache()
    return called


def _zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, device="cuda", dtype=dtype)


def _ones(*shape: int) -> torch.Tensor:
    """Scales."""
    return torch.ones(shape, device="cuda", dtype=torch.float32)


def _fp8_rows(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations with row-major scales, one per 128 values."""
    scales = _ones(*shape[:-1], -(-shape[-1] // 128))
    return _zeros(*shape, dtype=_FP8), scales


def _fp8_blocks(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with one scale per 128 x 128 block."""
    blocks = (-(-shape[-2] // 128), -(-shape[-1] // 128))
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


_MAKERS: dict[T, Callable[[DeepGemmWrapper, GemmShape, int], Call]] = {
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
}
