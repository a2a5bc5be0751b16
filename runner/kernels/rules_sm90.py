"""From a wrapper call to the kernels that it runs: names and generated sources, for SM90.

Source: csrc/jit_kernels/impls/*.hpp and csrc/apis/*.hpp of DeepGEMM 2.6. A generated source is an
include and one template instantiation; ``CacheKeys.source`` adds the line with the hash of the
included headers that the library puts before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from runner.errors import UserError
from runner.kernels.heuristics_sm90 import (
    CONTIGUOUS_M_ALIGNMENT,
    M_GRANULE,
    SMEM_CAPACITY,
    GemmConfig,
    GemmDesc,
    GemmType,
    KernelFamily,
    align,
    get_best_config,
    swizzle_mode,
)
from runner.kernels.kernel import Kernel
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import KernelCall

_METADATA_ROWS = 32
METADATA_MAX_ROWS = SMEM_CAPACITY // 4
"""The metadata kernel keeps an integer a row in shared memory; the library refuses more rows."""
_HC_MAX_N = 32
_MQA_HEADS = (32, 64)
_MQA_HEAD_DIMS = (32, 64, 128)


def kernels_of(call: KernelCall) -> tuple[Kernel, ...]:
    """Kernels that the library runs, in order, for one call on SM90.

    The FP8 types bring the transpose of their activation scales along: they are handed row-major
    [m, k / 128] FP32 scales, as SGLang's warm-up hands them. A call with ``m == 0`` runs nothing.
    """
    if call.type not in _FAMILIES:
        raise UserError(
            f"our rules do not know {call.type.name.lower()}: ask a library that has it (--library)"
        )
    return _kernels_of(call) if call.m > 0 else ()


@lru_cache(maxsize=65536)
def _kernels_of(call: KernelCall) -> tuple[Kernel, ...]:
    return _FAMILIES[call.type](call)


def _dense_fp8(call: KernelCall) -> tuple[Kernel, ...]:
    desc = _desc(call, GemmType.NORMAL, KernelFamily.FP8_1D2D)
    return transpose_fp32(call.k), _fp8_1d2d("sm90_fp8_gemm_1d2d", desc, compiled="")


def _contiguous_fp8(call: KernelCall) -> tuple[Kernel, ...]:
    desc = _desc(call, GemmType.M_GROUPED_CONTIGUOUS, KernelFamily.FP8_1D2D)
    name = "sm90_m_grouped_fp8_gemm_contiguous_1d2d"
    return transpose_fp32(call.k), _fp8_1d2d(name, desc, compiled="nk")


def _masked_fp8(call: KernelCall) -> tuple[Kernel, ...]:
    desc = _desc(call, GemmType.M_GROUPED_MASKED, KernelFamily.FP8_1D2D)
    name = "sm90_fp8_m_grouped_gemm_masked_1d2d"
    return transpose_fp32(call.k), _fp8_1d2d(name, desc, compiled="nk")


def _einsum_fp8(call: KernelCall) -> tuple[Kernel, ...]:
    desc = _desc(call, GemmType.BATCHED, KernelFamily.FP8_1D2D)
    gemm = _fp8_1d2d("sm90_fp8_gemm_1d2d", desc, compiled="nk")
    # The scales arrive permuted to [groups, m, k / 128]. Only where that is still contiguous does
    # the library transpose them with a kernel of its own; otherwise torch copies them.
    if call.m == 1 or call.num_groups == 1:
        return transpose_fp32(call.k), gemm
    return (gemm,)


def _dense_bf16(call: KernelCall) -> tuple[Kernel, ...]:
    desc = _desc(call, GemmType.NORMAL, KernelFamily.NO_SF)
    desc = replace(desc, fp32_output=call.type is T.GEMM_NT_BF16BF16F32)
    return (_bf16("sm90_bf16_gemm", desc, compiled=""),)


def _contiguous_bf16(call: KernelCall) -> tuple[Kernel, ...]:
    desc = _desc(call, GemmType.M_GROUPED_CONTIGUOUS, KernelFamily.NO_SF)
    return (_bf16("sm90_m_grouped_bf16_gemm_contiguous", desc, compiled="nk"),)


def _masked_bf16(call: KernelCall) -> tuple[Kernel, ...]:
    desc = _desc(call, GemmType.M_GROUPED_MASKED, KernelFamily.NO_SF)
    return (_bf16("sm90_bf16_m_grouped_gemm_masked", desc, compiled="nk"),)


def _desc(call: KernelCall, gemm_type: GemmType, family: KernelFamily) -> GemmDesc:
    """The library is told the expected M of grouped GEMMs; the contiguous layout is one group."""
    expected_groups = {GemmType.M_GROUPED_CONTIGUOUS: 1, GemmType.M_GROUPED_MASKED: call.num_groups}
    grouped = gemm_type in expected_groups
    return GemmDesc(
        gemm_type,
        family,
        call.m,
        call.n,
        call.k,
        1 if gemm_type is GemmType.NORMAL else call.num_groups,
        call.num_sms,
        expected_m=call.m if grouped else 0,
        expected_num_groups=expected_groups.get(gemm_type, 0),
    )


def _hc_prenorm(call: KernelCall) -> tuple[Kernel, ...]:
    block_m, block_k, block_n = 64, 64, align(call.n, 16)
    swizzle_cd = swizzle_mode(block_n, 4)
    per_stage = block_m * block_k * 2 + block_n * block_k * 4
    fitting = (SMEM_CAPACITY - block_m * swizzle_cd) // (per_stage + 16)
    if call.n > _HC_MAX_N or call.n % 8 or call.k % block_k:
        raise UserError(
            f"no tf32_hc_prenorm_gemm kernel exists for n={call.n}, k={call.k}: n must be a "
            f"multiple of 8 up to {_HC_MAX_N} and k a multiple of {block_k}"
        )
    num_stages = min(fitting, 12)
    arguments = (
        f"{call.n}, {call.k}",
        f"{block_m}, {block_n}, {block_k}",
        str(call.num_groups or 1),
        str(swizzle_cd),
        str(num_stages),
        "128, 128",
    )
    name = "sm90_tf32_hc_prenorm_gemm"
    return (Kernel(name, f"deep_gemm/impls/{name}.cuh", f"{name}_impl", arguments),)


def _mqa_logits(call: KernelCall) -> tuple[Kernel, ...]:
    _check_heads(call)
    arguments = (
        f"{call.n}, {call.k}",
        "true",  # compressed logits: SGLang always gives max_seqlen_k
        f"{128 // call.n}, 256",
        "3, 3",
        str(call.num_sms),
        "128, 512",
        "float",
    )
    name = "sm90_fp8_mqa_logits"
    return (Kernel(name, f"deep_gemm/impls/{name}.cuh", name, arguments),)


def _paged_mqa_logits_metadata(call: KernelCall) -> tuple[Kernel, ...]:
    name = "sm90_paged_mqa_logits_metadata"
    if call.m > METADATA_MAX_ROWS:
        raise UserError(
            f"no {name} kernel exists for {call.m} rows: at most {METADATA_MAX_ROWS} fit"
        )
    arguments = (f"{align(call.m, _METADATA_ROWS)}, 256, {call.num_sms}, false",)
    header = "deep_gemm/scheduler/sm90_paged_mqa_logits.cuh"
    return (Kernel(name, header, f"sched::{name}", arguments),)


def _check_heads(call: KernelCall) -> None:
    if call.n not in _MQA_HEADS or call.k not in _MQA_HEAD_DIMS:
        raise UserError(
            f"no {call.type.name.lower()} kernel exists for {call.n} heads of {call.k}: heads must "
            f"be one of {_MQA_HEADS}, the head dimension one of {_MQA_HEAD_DIMS}"
        )


def _paged_mqa_logits(call: KernelCall) -> tuple[Kernel, ...]:
    _check_heads(call)
    arguments = (
        f"1, {call.n}",
        f"{call.k}, 64",
        "true, false",
        "3, 3",
        "256",
        "128, 512",
        "float",
    )
    name = "sm90_fp8_paged_mqa_logits"
    return (Kernel(name, f"deep_gemm/impls/{name}.cuh", name, arguments),)


def transpose_fp32(k: int) -> Kernel:
    """Transpose of [m, k / 128] FP32 activation scales into the layout that TMA wants."""
    header = "deep_gemm/impls/smxx_layout.cuh"
    return Kernel("transpose_fp32", header, "transpose_fp32", (f"512, 64, {-(-k // 128)}",))


def _bf16(name: str, desc: GemmDesc, *, compiled: str) -> Kernel:
    config = get_best_config(desc)
    arguments = (
        "cute::UMMA::Major::K, cute::UMMA::Major::K",
        *_gemm_arguments(desc, config, compiled=compiled),
        str(config.num_sms),
        f"{desc.gemm_type.value}, false",
        _output_type(desc),
    )
    header = "deep_gemm/impls/sm90_bf16_gemm.cuh"
    return Kernel(name, header, "sm90_bf16_gemm_impl", arguments)


def _fp8_1d2d(name: str, desc: GemmDesc, *, compiled: str) -> Kernel:
    config = get_best_config(desc)
    arguments = (
        "cute::UMMA::Major::K",
        *_gemm_arguments(desc, config, compiled=compiled),
        f"{config.num_sms}, {desc.gemm_type.value}",
        _output_type(desc),
        "epilogue::transform::EpilogueIdentity",
    )
    header = "deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh"
    return Kernel(name, header, "sm90_fp8_gemm_1d2d_impl", arguments)


def _gemm_arguments(desc: GemmDesc, config: GemmConfig, *, compiled: str) -> tuple[str, ...]:
    layout = config.layout
    multicast_on_a = "true" if layout.cluster_n > 1 else "false"
    return (
        f"0, {desc.n if 'n' in compiled else 0}, {desc.k if 'k' in compiled else 0}",
        str(desc.num_groups),
        f"{layout.block_m}, {layout.block_n}, {layout.block_k}",
        f"{config.swizzle_a_mode}, {config.swizzle_b_mode}, {config.swizzle_cd_mode}",
        str(config.num_stages),
        f"{config.num_tma_threads}, {config.num_math_threads}",
        f"{layout.cluster_size}, {multicast_on_a}",
    )


def _output_type(desc: GemmDesc) -> str:
    return "float" if desc.fp32_output else "cutlass::bfloat16_t"


_FAMILIES: dict[T, Callable[[KernelCall], tuple[Kernel, ...]]] = {
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
    T.PAGED_MQA_LOGITS_METADATA: _paged_mqa_logits_metadata,
    T.FP8_PAGED_MQA_LOGITS: _paged_mqa_logits,
}


RULED_TYPES = frozenset(_FAMILIES)
"""What the rules know."""

_TILED = ((1, 17, 33), M_GRANULE)
_M_CLASSES: dict[T, tuple[tuple[int, ...], int]] = {
    T.GEMM_NT_F8F8BF16: _TILED,
    T.GROUPED_GEMM_NT_F8F8BF16_CONTIG: ((1,), CONTIGUOUS_M_ALIGNMENT),
    T.GROUPED_GEMM_NT_F8F8BF16_MASKED: ((1,), M_GRANULE),
    T.GEMM_NT_BF16BF16F32: _TILED,
    T.GEMM_NT_BF16BF16BF16: _TILED,
    T.GROUPED_GEMM_NT_BF16_CONTIG: ((1,), CONTIGUOUS_M_ALIGNMENT),
    T.GROUPED_GEMM_NT_BF16_MASKED: ((1,), M_GRANULE),
    T.TF32_HC_PRENORM_GEMM: ((1,), 0),
    T.FP8_EINSUM_BHR_HDR_BHD: ((1, 2, 17, 33), M_GRANULE),
    T.FP8_MQA_LOGITS: ((1,), 0),
    T.PAGED_MQA_LOGITS_METADATA: ((1,), _METADATA_ROWS),
    T.FP8_PAGED_MQA_LOGITS: ((1,), 0),
}


def m_class_starts(kind: T, last: int) -> list[int]:
    """First M of each class up to ``last``: within a class every M runs the same kernels."""
    starts, step = _M_CLASSES.get(kind, ((1,), 0))
    more = range(step + 1, last + 1, step) if step else ()
    return [*(start for start in starts if start <= last), *more]
