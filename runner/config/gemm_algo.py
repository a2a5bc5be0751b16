"""The ways to multiply bf16 by bf16 into fp32, by SGLang's names for them."""

from __future__ import annotations

from enum import Enum


class Bf16Fp32Algo(Enum):
    """Values of ``SGLANG_OPT_BF16_FP32_GEMM_ALGO``.

    SGLang's fourth value, ``hpc``, needs a library that is not supported here.
    """

    CUBLAS = "cublas"
    """cuBLAS reads bf16 and writes fp32; without a GPU, an fp32 product of widened operands."""

    DEEP_GEMM = "deep_gemm"
    """DeepGEMM's ``GEMM_NT_BF16BF16F32``: the only one of the three with kernels to compile."""

    TORCH = "torch"
    """torch's ``linear`` on operands widened to fp32."""


DEFAULT_BF16_FP32_ALGO = Bf16Fp32Algo.DEEP_GEMM
"""Taken where the environment names none. SGLang 0.5.23 takes cuBLAS; this has more kernels."""
