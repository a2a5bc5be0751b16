"""Our rules for one version of the library on SM90: any GEMM and M, without library or torch.

Source: csrc/jit_kernels/impls/*.hpp and csrc/apis/*.hpp of DeepGEMM 2.6. A generated source is an
include and one template instantiation, after a line with the hash of the included headers, which
``CacheKeys.source`` adds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from runner.config.environ import Environ
from runner.errors import UserError
from runner.kernels.call_template import CallShape
from runner.kernels.heuristics_sm90 import (
    CONTIGUOUS_M_ALIGNMENT,
    M_GRANULE,
    SMEM_CAPACITY,
    GemmDesc,
    Layout,
    align,
    best_layout,
    ceil_div,
    num_stages,
    swizzle_mode,
)
from runner.kernels.heuristics_sm90 import GemmType as G
from runner.kernels.kernel import Kernel
from runner.kernels.keys import Recipe, first_recipe
from runner.kernels.table import Kernels, KernelTable, Origin, Part, Shape, Source, append_part
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import KernelCall

RULES_VERSION = "0.1.4.post1"
"""The version of sgl-deep-gemm that the rules are for and were checked against, on SM90."""

RULES_ARCH = "sm_90a"

METADATA_MAX_ROWS = SMEM_CAPACITY // 4
"""Most rows of the metadata kernel, which keeps one integer per row in shared memory."""

_METADATA_ROWS = 32
_HC_MAX_N = 32
_MQA_HEADS = (32, 64)
_MQA_HEAD_DIMS = (32, 64, 128)

_GEMMS: dict[T, tuple[str, G]] = {
    T.GEMM_NT_F8F8BF16: ("sm90_fp8_gemm_1d2d", G.NORMAL),
    T.GROUPED_GEMM_NT_F8F8BF16_CONTIG: ("sm90_m_grouped_fp8_gemm_contiguous_1d2d", G.CONTIGUOUS),
    T.GROUPED_GEMM_NT_F8F8BF16_MASKED: ("sm90_fp8_m_grouped_gemm_masked_1d2d", G.MASKED),
    T.FP8_EINSUM_BHR_HDR_BHD: ("sm90_fp8_gemm_1d2d", G.BATCHED),
    T.GEMM_NT_BF16BF16F32: ("sm90_bf16_gemm", G.NORMAL),
    T.GEMM_NT_BF16BF16BF16: ("sm90_bf16_gemm", G.NORMAL),
    T.GROUPED_GEMM_NT_BF16_CONTIG: ("sm90_m_grouped_bf16_gemm_contiguous", G.CONTIGUOUS),
    T.GROUPED_GEMM_NT_BF16_MASKED: ("sm90_bf16_m_grouped_gemm_masked", G.MASKED),
}
"""Kernel name and layout of every type with a tiled GEMM."""

_GEMM_M_CLASSES = {
    G.NORMAL: ((1, 17, 33), M_GRANULE),
    G.CONTIGUOUS: ((1,), CONTIGUOUS_M_ALIGNMENT),
    G.MASKED: ((1,), M_GRANULE),
    G.BATCHED: ((1, 2, 17, 33), M_GRANULE),
}


def kernels_of(call: KernelCall) -> tuple[Kernel, ...]:
    """Kernels that the library runs for one call on SM90, in order; none if ``m`` is 0.

    FP8 types also transpose their activation scales, which callers pass as row-major [m, k / 128]
    FP32, like SGLang's warm-up.

    Raises:
        UserError: the library has no kernel for this type or shape.
    """
    if call.type not in RULED_TYPES:
        raise UserError(
            f"our rules do not cover {call.type.name.lower()}: give a library that does (--library)"
        )
    return _kernels_of(call) if call.m > 0 else ()


@lru_cache(maxsize=65536)
def _kernels_of(call: KernelCall) -> tuple[Kernel, ...]:
    return _gemm(call) if call.type in _GEMMS else (_OTHERS[call.type](call),)


def m_class_starts(kind: T, last: int) -> list[int]:
    """First M of each class up to ``last``; all M in a class run the same kernels."""
    starts: tuple[int, ...] = (1,)
    step = _METADATA_ROWS if kind is T.PAGED_MQA_LOGITS_METADATA else 0
    if kind in _GEMMS:
        starts, step = _GEMM_M_CLASSES[_GEMMS[kind][1]]
    more = range(step + 1, last + 1, step) if step else ()
    return [*(start for start in starts if start <= last), *more]


@lru_cache(maxsize=1024)
def transpose_fp32(k: int) -> Kernel:
    """The kernel that transposes [m, k / 128] FP32 activation scales to the layout for TMA."""
    header = "deep_gemm/impls/smxx_layout.cuh"
    return Kernel("transpose_fp32", header, "transpose_fp32", (f"512, 64, {ceil_div(k, 128)}",))


def _gemm(call: KernelCall) -> tuple[Kernel, ...]:
    desc = _desc(call.type, call.n, call.k, call.num_groups, call.num_sms)
    gemm = _tiled(call.type, desc, best_layout(desc, call.m))
    # The einsum's scales are permuted to [groups, m, k / 128]. The library transposes them with its
    # own kernel only if they are still contiguous; otherwise torch copies them.
    permuted = desc.gemm_type is G.BATCHED and call.m > 1 and call.num_groups > 1
    return (transpose_fp32(call.k), gemm) if desc.is_fp8 and not permuted else (gemm,)


@lru_cache(maxsize=4096)
def _desc(kind: T, n: int, k: int, num_groups: int, num_sms: int) -> GemmDesc:
    name, gemm_type = _GEMMS[kind]
    groups = 1 if gemm_type is G.NORMAL else num_groups
    fp32_output = kind is T.GEMM_NT_BF16BF16F32
    return GemmDesc(gemm_type, "fp8" in name, n, k, groups, num_sms, fp32_output)


@lru_cache(maxsize=4096)
def _tiled(kind: T, desc: GemmDesc, layout: Layout) -> Kernel:
    """The kernel of a tiled GEMM."""
    name, gemm_type = _GEMMS[kind]
    common = (
        "0, 0, 0" if gemm_type is G.NORMAL else f"0, {desc.n}, {desc.k}",
        str(desc.num_groups),
        f"{layout.block_m}, {layout.block_n}, {layout.block_k}",
        f"128, 128, {0 if desc.fp32_output else swizzle_mode(layout.block_n, 2)}",
        str(num_stages(desc, layout)),
        f"128, {128 if layout.block_m <= 64 else 256}",
        f"{layout.cluster_size}, {'true' if layout.cluster_n > 1 else 'false'}",
    )
    output = "float" if desc.fp32_output else "cutlass::bfloat16_t"
    sms, major = desc.num_sms, "cute::UMMA::Major::K"
    if desc.is_fp8:
        impl = "sm90_fp8_gemm_1d2d"
        tail = (f"{sms}, {gemm_type.value}", output, "epilogue::transform::EpilogueIdentity")
        arguments = (major, *common, *tail)
    else:
        impl = "sm90_bf16_gemm"
        arguments = (f"{major}, {major}", *common, str(sms), f"{gemm_type.value}, false", output)
    return Kernel(name, f"deep_gemm/impls/{impl}.cuh", f"{impl}_impl", arguments)


def _hc_prenorm(call: KernelCall) -> Kernel:
    block_m, block_k, block_n = 64, 64, align(call.n, 16)
    if call.n > _HC_MAX_N or call.n % 8 or call.k % block_k:
        raise UserError(
            f"no tf32_hc_prenorm_gemm kernel exists for n={call.n}, k={call.k}: n must be a "
            f"multiple of 8 up to {_HC_MAX_N} and k a multiple of {block_k}"
        )
    swizzle_cd = swizzle_mode(block_n, 4)
    per_stage = block_m * block_k * 2 + block_n * block_k * 4
    stages = min((SMEM_CAPACITY - block_m * swizzle_cd) // (per_stage + 16), 12)
    arguments = (
        f"{call.n}, {call.k}",
        f"{block_m}, {block_n}, {block_k}",
        str(call.num_groups or 1),
        str(swizzle_cd),
        str(stages),
        "128, 128",
    )
    name = "sm90_tf32_hc_prenorm_gemm"
    return Kernel(name, f"deep_gemm/impls/{name}.cuh", f"{name}_impl", arguments)


def _mqa_logits(call: KernelCall) -> Kernel:
    if call.n not in _MQA_HEADS or call.k not in _MQA_HEAD_DIMS:
        raise UserError(
            f"no {call.type.name.lower()} kernel exists for {call.n} heads of {call.k}: heads must "
            f"be one of {_MQA_HEADS}, the head dimension one of {_MQA_HEAD_DIMS}"
        )
    if call.type is T.FP8_PAGED_MQA_LOGITS:
        name = "sm90_fp8_paged_mqa_logits"
        arguments = (f"1, {call.n}", f"{call.k}, 64", "true, false", "3, 3", "256")
    else:
        name = "sm90_fp8_mqa_logits"
        # "true" is compressed logits: SGLang always passes max_seqlen_k.
        blocks = f"{128 // call.n}, 256"
        arguments = (f"{call.n}, {call.k}", "true", blocks, "3, 3", str(call.num_sms))
    return Kernel(name, f"deep_gemm/impls/{name}.cuh", name, (*arguments, "128, 512", "float"))


def _paged_mqa_logits_metadata(call: KernelCall) -> Kernel:
    name = "sm90_paged_mqa_logits_metadata"
    if call.m > METADATA_MAX_ROWS:
        raise UserError(
            f"no {name} kernel exists for {call.m} rows: at most {METADATA_MAX_ROWS} fit"
        )
    arguments = (f"{align(call.m, _METADATA_ROWS)}, 256, {call.num_sms}, false",)
    header = "deep_gemm/scheduler/sm90_paged_mqa_logits.cuh"
    return Kernel(name, header, f"sched::{name}", arguments)


_OTHERS: dict[T, Callable[[KernelCall], Kernel]] = {
    T.TF32_HC_PRENORM_GEMM: _hc_prenorm,
    T.FP8_MQA_LOGITS: _mqa_logits,
    T.PAGED_MQA_LOGITS_METADATA: _paged_mqa_logits_metadata,
    T.FP8_PAGED_MQA_LOGITS: _mqa_logits,
}

RULED_TYPES = frozenset({*_GEMMS, *_OTHERS})
"""Types that the rules cover."""


@dataclass(frozen=True)
class RulesTable(KernelTable):
    """Our rules as a table, which covers every GEMM and M."""

    origin: Origin
    recipe: Recipe

    def kernels_of(self, call: KernelCall) -> Kernels:
        return kernels_of(call)

    def parts(self, shape: Shape, ms: Sequence[int]) -> list[Part]:
        if isinstance(shape, CallShape):
            raise UserError(f"our rules do not cover recorded calls: give a library ({shape.text})")
        found: list[Part] = []
        starts = m_class_starts(shape.type, ms[-1]) if ms else ()
        edges = [*(bisect_left(ms, start) for start in starts), len(ms)]
        for low, high in pairwise(edges):
            if low < high:
                append_part(found, kernels_of(shape.call(ms[low])), low, high)
        return found

    def on(self, gpu: str, num_sms: int, recipe: Recipe) -> RulesTable:
        """The same rules on another Hopper GPU, compiled with other flags."""
        return RulesTable(replace(self.origin, gpu=gpu, num_sms=num_sms), recipe)


RULES = RulesTable(
    Origin(f"sgl-deep-gemm {RULES_VERSION}", 1, "h200", 132, RULES_ARCH, Source.RULES),
    first_recipe(Environ()),
)
"""The rules on an H200."""
