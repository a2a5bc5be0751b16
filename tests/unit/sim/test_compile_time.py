"""Predicted compile times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.build.estimates import plain_seconds
from runner.kernels.kernel import Kernel
from runner.kernels.rules import kernels_of
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import KernelCall
from sim.costs.profile import CompileTimes
from sim.costs.profile_costs import compile_seconds, config_key, slowdown, template_of


def kernel(kind: T, m: int, n: int, k: int, groups: int = 1) -> Kernel:
    return kernels_of(KernelCall(kind, m, n, k, groups, 132))[-1]


DENSE = kernel(T.GEMM_NT_F8F8BF16, 64, 1536, 4096)
MASKED = kernel(T.GROUPED_GEMM_NT_F8F8BF16_MASKED, 64, 2048, 4096, 256)
PRENORM = kernel(T.TF32_HC_PRENORM_GEMM, 64, 24, 4096)
TRANSPOSE = kernels_of(KernelCall(T.GEMM_NT_F8F8BF16, 64, 1536, 4096, 1, 132))[0]


def times(**changes: object) -> CompileTimes:
    values = {
        "by_config": {},
        "scale": {},
        "default_scale": 1.0,
        "contention": 0.0,
        **changes,
    }
    return CompileTimes(**values)  # type: ignore[arg-type]


def test_template_of_names_the_template_of_a_kernel() -> None:
    assert template_of(DENSE) == template_of(MASKED) == "sm90_fp8_gemm_1d2d"
    assert template_of(PRENORM) == "sm90_tf32_hc_prenorm_gemm"
    assert template_of(kernel(T.GEMM_NT_BF16BF16F32, 64, 256, 4096)) == "sm90_bf16_gemm"
    assert template_of(TRANSPOSE) == "transpose_fp32"


def test_config_key_does_not_depend_on_shape() -> None:
    one, other = (kernel(T.TF32_HC_PRENORM_GEMM, 64, 24, k) for k in (2048, 4096))
    assert one != other and config_key(one) == config_key(other) == "sm90_tf32_hc_prenorm_gemm"
    masked = [kernel(T.GROUPED_GEMM_NT_F8F8BF16_MASKED, 64, 2048, k, 256) for k in (2048, 4096)]
    assert masked[0] != masked[1]
    assert config_key(masked[0]) == config_key(masked[1])
    assert config_key(masked[0]).startswith("sm90_fp8_gemm_1d2d ")
    assert "4096" not in config_key(masked[0])


@pytest.mark.parametrize(
    ("kind", "k", "blocks"),
    [
        (T.GROUPED_GEMM_NT_F8F8BF16_MASKED, 128, 1),
        (T.GROUPED_GEMM_NT_F8F8BF16_MASKED, 512, 4),
        (T.GROUPED_GEMM_NT_F8F8BF16_MASKED, 1024, 8),
        (T.GROUPED_GEMM_NT_F8F8BF16_CONTIG, 512, 4),
        (T.FP8_EINSUM_BHR_HDR_BHD, 896, 7),
        (T.GROUPED_GEMM_NT_BF16_MASKED, 256, 4),
        # Dense kernels take K at run time.
        (T.GEMM_NT_F8F8BF16, 512, 8),
        (T.GEMM_NT_BF16BF16F32, 256, 8),
    ],
)
def test_config_key_holds_number_of_unrolled_k_blocks(kind: T, k: int, blocks: int) -> None:
    short, long = (kernel(kind, 64, 512, size, 4) for size in (k, 8192))
    start = config_key(short).removesuffix(f" | {blocks} K-blocks")
    assert config_key(short) == f"{start} | {blocks} K-blocks"
    assert config_key(long) == f"{start} | 8 K-blocks"


def test_compile_seconds_prefers_measured_time_then_template_scale_then_default() -> None:
    plain = plain_seconds(DENSE)
    assert compile_seconds(times(default_scale=1.5), DENSE) == 1.5 * plain
    scale = {"sm90_fp8_gemm_1d2d": 2.0}
    assert compile_seconds(times(default_scale=1.5, scale=scale), DENSE) == 2.0 * plain
    assert compile_seconds(times(default_scale=1.5, scale=scale), PRENORM) == 1.5 * plain_seconds(
        PRENORM
    )
    measured = times(by_config={config_key(DENSE): 5.0}, scale=scale)
    assert compile_seconds(measured, DENSE) == 5.0
    assert compile_seconds(measured, MASKED) == 2.0 * plain_seconds(MASKED)


@pytest.mark.parametrize(
    ("compilers", "cores", "expected"),
    [
        (1, 5, 1.0),
        (2, 5, 1.1),
        (3, 5, 1.2),
        (5, 5, 1.4),
        (10, 5, 2.8),
        (1, 1, 1.0),
        (2, 1, 2.0),
        (1, 2, 1.0),
        (2, 2, 1.4),
    ],
)
def test_slowdown_is_linear_in_compilers_and_shares_cores_beyond(
    compilers: int, cores: int, expected: float
) -> None:
    assert slowdown(times(contention=0.4), compilers, cores) == pytest.approx(expected)


@given(st.floats(0, 5), st.integers(1, 200))
def test_single_compile_is_not_slowed_down(contention: float, cores: int) -> None:
    assert slowdown(times(contention=contention), 1, cores) == 1.0
