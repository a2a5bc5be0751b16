"""The rules for which kernels a call needs, against measurements on an H200."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import UserError
from runner.kernels.describe import name_of_source
from runner.kernels.heuristics_sm90 import SMEM_CAPACITY, align, ceil_div, swizzle_mode
from runner.kernels.installed import Library
from runner.kernels.kernel import Kernel
from runner.kernels.rules import RULED_TYPES, kernels_of, transpose_fp32
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import KernelCall
from tests.measured import MEASURED, TYPES

NUM_SMS = 132


def measured_call(shape: dict[str, Any], m: int) -> KernelCall:
    groups = shape["g"]
    if shape["kind"] == "hc":
        groups = max(1, NUM_SMS // ceil_div(m, 64))
    return KernelCall(TYPES[shape["kind"]], m, shape["n"], shape["k"], groups, NUM_SMS)


def candidates(shape: dict[str, Any]) -> list[int]:
    """M up to 70, and both sides of each multiple of 16 and of each recorded M."""
    last = shape["last_m"]
    if shape["kind"] == "contig":
        return list(range(128, last + 1, 128))
    recorded = {m for m, _ in shape["compiles"]}
    edges = {edge + step for edge in range(16, last, 16) for step in (0, 1)}
    return sorted({*range(1, 71), *edges, *recorded, *(m - 1 for m in recorded if m > 1), last})


@pytest.mark.parametrize("shape", MEASURED, ids=lambda shape: shape["tag"])
def test_new_kernels_appear_at_the_measured_m(shape: dict[str, Any]) -> None:
    seen: set[Kernel] = set()
    first_at = []
    for m in candidates(shape):
        new = set(kernels_of(measured_call(shape, m))) - seen
        if new:
            first_at.append(m)
            seen |= new
    assert first_at == [m for m, _ in shape["compiles"]]
    assert len(seen) == shape["kernels"]


def call(kind: T, **values: int) -> KernelCall:
    defaults = {"m": 100, "n": 4096, "k": 1024, "num_groups": 1, "num_sms": NUM_SMS}
    return KernelCall(kind, **{**defaults, **values})


GEMM = "sm90_fp8_gemm_1d2d"
EXAMPLES = [
    (call(T.GEMM_NT_F8F8BF16), ["transpose_fp32", GEMM]),
    (
        call(T.GROUPED_GEMM_NT_F8F8BF16_CONTIG, m=256, num_groups=256),
        ["transpose_fp32", "sm90_m_grouped_fp8_gemm_contiguous_1d2d"],
    ),
    (
        call(T.GROUPED_GEMM_NT_F8F8BF16_MASKED, num_groups=256),
        ["transpose_fp32", "sm90_fp8_m_grouped_gemm_masked_1d2d"],
    ),
    (call(T.GEMM_NT_BF16BF16F32, n=256, k=4096), ["sm90_bf16_gemm"]),
    (call(T.GEMM_NT_BF16BF16BF16), ["sm90_bf16_gemm"]),
    (
        call(T.GROUPED_GEMM_NT_BF16_CONTIG, m=256, num_groups=32),
        ["sm90_m_grouped_bf16_gemm_contiguous"],
    ),
    (call(T.GROUPED_GEMM_NT_BF16_MASKED, num_groups=32), ["sm90_bf16_m_grouped_gemm_masked"]),
    (call(T.TF32_HC_PRENORM_GEMM, n=24, k=16384, num_groups=66), ["sm90_tf32_hc_prenorm_gemm"]),
    (call(T.FP8_EINSUM_BHR_HDR_BHD, n=1024, k=4096, num_groups=4), [GEMM]),
    (call(T.FP8_EINSUM_BHR_HDR_BHD, m=1, num_groups=4), ["transpose_fp32", GEMM]),
    (call(T.FP8_EINSUM_BHR_HDR_BHD, num_groups=1), ["transpose_fp32", GEMM]),
    (call(T.FP8_MQA_LOGITS, n=64, k=128), ["sm90_fp8_mqa_logits"]),
    (call(T.PAGED_MQA_LOGITS_METADATA, n=64, k=128), ["sm90_paged_mqa_logits_metadata"]),
    (call(T.FP8_PAGED_MQA_LOGITS, n=64, k=128), ["sm90_fp8_paged_mqa_logits"]),
]
every_example = pytest.mark.parametrize(
    ("example", "names"), EXAMPLES, ids=[each.describe() for each, _ in EXAMPLES]
)


def test_every_gemm_type_with_rules_has_an_example() -> None:
    assert {example.type for example, _ in EXAMPLES} == RULED_TYPES


@every_example
def test_names_of_the_kernels_of_a_call(example: KernelCall, names: list[str]) -> None:
    kernels = kernels_of(example)
    assert [kernel.name for kernel in kernels] == names
    assert kernels_of(replace(example, m=0)) == ()
    for kernel in kernels:
        assert name_of_source(kernel.body) == kernel.name
        assert name_of_source(f"// Includes' hash value: 00\n{kernel.body}") == kernel.name


@every_example
def test_kernel_headers_and_entries_exist_in_the_library(
    example: KernelCall, names: list[str], library: Library
) -> None:
    for kernel in kernels_of(example):
        header = library.include_path / kernel.header
        assert kernel.entry.rpartition("::")[2] in header.read_text()


def test_gemm_type_without_rules_is_refused() -> None:
    with pytest.raises(UserError, match="our rules do not cover gemm_nt_f8f4bf16: give a library"):
        kernels_of(call(T.GEMM_NT_F8F4BF16))


def arguments(kind: T, **values: int) -> tuple[str, ...]:
    return kernels_of(call(kind, **values))[-1].arguments


def test_n_and_k_are_compile_time_constants_except_in_dense_kernels() -> None:
    for kind in (T.GEMM_NT_F8F8BF16, T.GEMM_NT_BF16BF16F32):
        assert arguments(kind)[1] == "0, 0, 0"
    for kind in (
        T.GROUPED_GEMM_NT_F8F8BF16_CONTIG,
        T.GROUPED_GEMM_NT_BF16_MASKED,
        T.FP8_EINSUM_BHR_HDR_BHD,
    ):
        assert arguments(kind)[1] == "0, 4096, 1024"


def test_template_arguments_of_kernels_without_heuristics() -> None:
    hc = arguments(T.TF32_HC_PRENORM_GEMM, n=24, k=16384, num_groups=66)
    assert hc == ("24, 16384", "64, 32, 64", "66", "128", "12", "128, 128")
    heads = {"n": 64, "k": 128}
    logits = ("64, 128", "true", "2, 256", "3, 3", "132", "128, 512", "float")
    assert arguments(T.FP8_MQA_LOGITS, **heads) == logits
    assert arguments(T.PAGED_MQA_LOGITS_METADATA, **heads) == ("128, 256, 132, false",)
    paged = ("1, 64", "128, 64", "true, false", "3, 3", "256", "128, 512", "float")
    assert arguments(T.FP8_PAGED_MQA_LOGITS, **heads) == paged
    assert transpose_fp32(4096).arguments == ("512, 64, 32",)
    assert transpose_fp32(4097).arguments == ("512, 64, 33",)


def test_zero_splits_equal_one_split() -> None:
    none, one = (kernels_of(call(T.TF32_HC_PRENORM_GEMM, n=24, num_groups=g)) for g in (0, 1))
    assert none == one


def test_source_of_a_dense_gemm() -> None:
    body = kernels_of(call(T.GEMM_NT_F8F8BF16, m=1, n=1536, k=4096))[1].body
    assert body == DENSE_SOURCE


DENSE_SOURCE = """
#include <deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh>

using namespace deep_gemm;

static void __instantiate_kernel() {
    auto ptr = reinterpret_cast<void*>(&sm90_fp8_gemm_1d2d_impl<
        cute::UMMA::Major::K,
        0, 0, 0,
        1,
        16, 16, 128,
        128, 128, 32,
        16,
        128, 128,
        1, false,
        132, GemmType::Normal,
        cutlass::bfloat16_t,
        epilogue::transform::EpilogueIdentity
    >);
};
"""


@given(st.integers(1, 20_000), st.sampled_from([64, 78, 112, 132]))
def test_sm_count_is_a_template_argument(m: int, num_sms: int) -> None:
    kernel = kernels_of(call(T.GEMM_NT_F8F8BF16, m=m, num_sms=num_sms))[1]
    assert f"{num_sms}, GemmType::Normal" in kernel.arguments


@given(
    st.sampled_from([T.GEMM_NT_F8F8BF16, T.GEMM_NT_BF16BF16F32]),
    st.integers(1, 20_000),
    st.integers(1, 128).map(lambda blocks: 64 * blocks),
    st.integers(1, 64).map(lambda blocks: 128 * blocks),
)
def test_chosen_tile_fits_shared_memory(kind: T, m: int, n: int, k: int) -> None:
    gemm = kernels_of(call(kind, m=m, n=n, k=k))[-1]
    block_m, block_n, block_k = map(int, gemm.arguments[3].split(", "))
    stages = int(gemm.arguments[5])
    element = 1 if kind is T.GEMM_NT_F8F8BF16 else 2
    assert block_k * element == 128
    assert 3 <= stages <= 16
    assert stages * (block_m + block_n) * block_k * element < SMEM_CAPACITY


@pytest.mark.parametrize(
    ("block", "element", "expected"),
    [(64, 2, 128), (48, 2, 32), (16, 2, 32), (32, 2, 64), (8, 2, 16)],
)
def test_swizzle_modes(block: int, element: int, expected: int) -> None:
    assert swizzle_mode(block, element) == expected


@given(st.integers(0, 10**6), st.integers(1, 10**4))
def test_ceil_div_and_align(a: int, b: int) -> None:
    assert (ceil_div(a, b) - 1) * b < a <= ceil_div(a, b) * b
    assert align(a, b) == ceil_div(a, b) * b
