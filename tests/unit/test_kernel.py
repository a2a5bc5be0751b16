"""Kernel: parsing generated source, and writing it back byte for byte."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.kernels.digest import hex_digest
from runner.kernels.kernel import Kernel, body_of
from runner.kernels.rules import kernels_of, transpose_fp32
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import KernelCall
from tests.unit.small_cache import keys_for, second_keys_for, second_library, small_library

DENSE = KernelCall(T.GEMM_NT_F8F8BF16, 100, 4096, 1024, 1, 132)

SM100_SOURCE = """
#include <deep_gemm/impls/sm100_fp8_fp4_gemm_1d1d.cuh>

using namespace deep_gemm;

static_assert(sizeof(int) == 4, "of a size");

static void __instantiate_kernel() {
    auto ptr = reinterpret_cast<void*>(&sm100_fp8_fp4_gemm_1d1d_impl<
        cute::UMMA::Major::K, cute::UMMA::Major::K,
        128, 128,
        0, 0, 0,
        cutlass::bfloat16_t
    >);
};
"""
SM100 = Kernel(
    "sm100_fp8_fp4_gemm_1d1d",
    "deep_gemm/impls/sm100_fp8_fp4_gemm_1d1d.cuh",
    "sm100_fp8_fp4_gemm_1d1d_impl",
    ("cute::UMMA::Major::K, cute::UMMA::Major::K", "128, 128", "0, 0, 0", "cutlass::bfloat16_t"),
    'static_assert(sizeof(int) == 4, "of a size");\n\n',
)

TWO_HEADERS = """
#include <deep_gemm/a.cuh>
#include <deep_gemm/b.cuh>

using namespace deep_gemm;

static void __instantiate_kernel() {
    auto ptr = reinterpret_cast<void*>(&gemm<
        1
    >);
};
"""


@pytest.mark.parametrize("kernel", [*kernels_of(DENSE), transpose_fp32(256)], ids=lambda k: k.name)
def test_generation_1_source_is_parsed_without_its_hash_line(
    kernel: Kernel, tmp_path: Path
) -> None:
    source = keys_for(small_library(tmp_path / "deep_gemm")).source(kernel)
    assert source.startswith("// Includes' hash value: ")
    assert Kernel.of_source(kernel.name, source) == kernel
    assert Kernel.of_source(kernel.name, kernel.body) == kernel
    assert body_of(source) == body_of(kernel.body) == kernel.body


def test_generation_2_source_has_no_hash_line(tmp_path: Path) -> None:
    kernel = kernels_of(DENSE)[1]
    source = second_keys_for(second_library(tmp_path / "deep_gemm")).source(kernel)
    assert source == kernel.body
    assert Kernel.of_source(kernel.name, source) == kernel


def test_source_with_a_prelude_is_parsed() -> None:
    assert Kernel.of_source(SM100.name, SM100_SOURCE) == SM100
    assert SM100.body == SM100_SOURCE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "int x;\n",
        TWO_HEADERS,
        SM100_SOURCE + "\n",
        SM100_SOURCE.replace("};\n", "}\n"),
        SM100_SOURCE.replace("        cute::", "    cute::"),
    ],
    ids=["empty", "arbitrary", "two headers", "trailing line", "cut", "other indent"],
)
def test_source_of_unknown_form_is_kept_as_prelude(text: str) -> None:
    kernel = Kernel.of_source("odd", text)
    assert kernel == Kernel("odd", "", "", (), text)
    assert kernel.body == text
    assert Kernel.of_source("odd", f"// Includes' hash value: {'0f' * 16}\n{text}") == kernel


def test_identity_is_name_and_digest_of_the_body() -> None:
    assert SM100.identity == f"{SM100.name} {hex_digest(SM100_SOURCE)[:16]}"
    assert replace(SM100, name="other").identity == f"other {hex_digest(SM100_SOURCE)[:16]}"


def kernels() -> st.SearchStrategy[Kernel]:
    words = st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), max_size=20)
    lines = st.lists(words, min_size=1, max_size=4).map(tuple)
    headers = st.text("abc/._", min_size=1, max_size=20)
    preludes = st.lists(words, max_size=3).map(lambda all_: "".join(f"{line}\n" for line in all_))
    return st.builds(
        Kernel, st.text("abc_1", min_size=1), headers, st.text("abc:_", min_size=1), lines, preludes
    )


@given(kernels())
def test_of_source_inverts_body(kernel: Kernel) -> None:
    assert Kernel.of_source(kernel.name, kernel.body) == kernel
