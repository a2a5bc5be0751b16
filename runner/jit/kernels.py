"""From a wrapper call to the kernels that it runs: names and generated sources, for SM90.

Source: csrc/jit_kernels/impls/*.hpp and csrc/apis/*.hpp of DeepGEMM 2.6. A generated source is an
include and one template instantiation; ``NvccCompiler.source`` adds the line with the hash of the
included headers that the library puts before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from runner.jit.digest import hex_digest
from runner.jit.heuristics_sm90 import (
    SMEM_CAPACITY,
    GemmConfig,
    GemmDesc,
    GemmType,
    KernelFamily,
    align,
    get_best_config,
    swizzle_mode,
)
from runner.jit.kernel_type import DeepGemmKernelType as T
from runner.jit.kernel_type import KernelCall


@dataclass(frozen=True, slots=True)
class Kernel:
    """One JIT kernel: what distinguishes it from every other, without include paths or hashes.

    ``name`` is the library's kernel name, ``header`` the included header relative to the include
    folder, ``entry`` the instantiated template and ``arguments`` its lines of template arguments.
    """

    name: str
    header: str
    entry: str
    arguments: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Text that is equal for equal kernels and short enough for a Timeline."""
        return f"{self.name} {hex_digest(self.body)[:16]}"

    @property
    def body(self) -> str:
        """Generated source without the line that holds the headers' hash."""
        lines = ",\n        ".join(self.arguments)
        return (
            f"\n#include <{self.header}>\n\nusing namespace deep_gemm;\n\n"
            "static void __instantiate_kernel() {\n"
            f"    auto ptr = reinterpret_cast<void*>(&{self.entry}<\n"
            f"        {lines}\n    >);\n}};\n"
        )


def kernels_of(call: KernelCall) -> tuple[Kernel, ...]:
    """Kernels that the library runs, in order, for one call on SM90.

    The FP8 types bring the transpose of their activation scales along: they are handed row-major
    [m, k / 128] FP32 scales, as SGLang's warm-up hands them. A call with ``m == 0`` runs nothing.
    """
    return _kernels_of(call) if call.m > 0 else ()


@lru_cache(maxsize=65536)
def _kernels_of(call: KernelCall) -> tuple[Kernel, ...]:
    return _FAMILIES[call.type](call)


def _dense_fp8(call: KernelCall) -> tuple[Kernel, ...]:
    desc = GemmDesc(GemmType.NORMAL, KernelFamily.FP8_1D2D, call.m, call.n, call.k, 1, call.num_sms)
    return transpose_fp32(call.k), _fp8_1d2d("sm90_fp8_gemm_1d2d", desc, compiled="")


def _contiguous_fp8(call: KernelCall) -> tuple[Kernel, ...]:
    desc = GemmDesc(
        GemmType.M_GROUPED_CONTIGUOUS, KernelFamily.FP8_1D2D, call.m, call.n, call.k,
        call.num_groups, call.num_sms, expected_m=call.m, expected_num_groups=1,
    )  # fmt: skip
    name = "sm90_m_grouped_fp8_gemm_contiguous_1d2d"
    return transpose_fp32(call.k), _fp8_1d2d(name, desc, compiled="nk")


def _masked_fp8(call: KernelCall) -> tuple[Kernel, ...]:
    desc = GemmDesc(
        GemmType.M_GROUPED_MASKED, KernelFamily.FP8_1D2D, call.m, call.n, call.k,
        call.num_groups, call.num_sms, expected_m=call.m, expected_num_groups=call.num_groups,
    )  # fmt: skip
    name = "sm90_fp8_m_grouped_gemm_masked_1d2d"
    return transpose_fp32(call.k), _fp8_1d2d(name, desc, compiled="nk")


def _einsum_fp8(call: KernelCall) -> tuple[Kernel, ...]:
    desc = GemmDesc(
        GemmType.BATCHED, KernelFamily.FP8_1D2D, call.m, call.n, call.k,
        call.num_groups, call.num_sms,
    )  # fmt: skip
    gemm = _fp8_1d2d("sm90_fp8_gemm_1d2d", desc, compiled="nk")
    # The scales arrive permuted to [groups, m, k / 128]. Only where that is still contiguous does
    # the library transpose them with a kernel of its own; otherwise torch copies them.
    if call.m == 1 or call.num_groups == 1:
        return transpose_fp32(call.k), gemm
    return (gemm,)


def _bf16(call: KernelCall) -> tuple[Kernel, ...]:
    desc = GemmDesc(
        GemmType.NORMAL, KernelFamily.NO_SF, call.m, call.n, call.k, 1, call.num_sms,
        fp32_output=True,
    )  # fmt: skip
    config = get_best_config(desc)
    arguments = (
        "cute::UMMA::Major::K, cute::UMMA::Major::K",
        *_gemm_arguments(desc, config, compiled=""),
        str(config.num_sms),
        f"{desc.gemm_type.value}, false",
        _output_type(desc),
    )
    header = "deep_gemm/impls/sm90_bf16_gemm.cuh"
    return (Kernel("sm90_bf16_gemm", header, "sm90_bf16_gemm_impl", arguments),)


def _hc_prenorm(call: KernelCall) -> tuple[Kernel, ...]:
    block_m, block_k, block_n = 64, 64, align(call.n, 16)
    swizzle_cd = swizzle_mode(block_n, 4)
    per_stage = block_m * block_k * 2 + block_n * block_k * 4
    num_stages = next(
        stages
        for stages in range(12, 0, -1)
        if (per_stage + 16) * stages + block_m * swizzle_cd <= SMEM_CAPACITY
    )
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
    arguments = (f"{align(call.m, 32)}, 256, {call.num_sms}, false",)
    header = "deep_gemm/scheduler/sm90_paged_mqa_logits.cuh"
    return (Kernel(name, header, f"sched::{name}", arguments),)


def _paged_mqa_logits(call: KernelCall) -> tuple[Kernel, ...]:
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
    T.GEMM_NT_BF16BF16F32: _bf16,
    T.TF32_HC_PRENORM_GEMM: _hc_prenorm,
    T.FP8_EINSUM_BHR_HDR_BHD: _einsum_fp8,
    T.FP8_MQA_LOGITS: _mqa_logits,
    T.PAGED_MQA_LOGITS_METADATA: _paged_mqa_logits_metadata,
    T.FP8_PAGED_MQA_LOGITS: _paged_mqa_logits,
}
