"""Steps that multiply matrices: DeepGEMM's kernels, and plain matrix products."""

from __future__ import annotations

from runner.backend.step_runner import StepRunner
from runner.backend.tensor import Dispatched, Fp8Weight, Tensor, spec
from runner.backend.token_to_m import hc_num_splits
from runner.config.environ import Bf16Fp32Algo
from runner.kernels.types import DeepGemmKernelType as T


class GemmSteps(StepRunner):
    """GEMMs of activations with weights.

    A ``partial`` result is one rank's part of a sum; a CPU keeps it wider than bf16 until the sum.
    """

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """[T, K] x [N, K] -> [T, N], plain bf16."""
        m, k = x.shape
        n = weight.shape[0]
        return self._compute(
            "linear",
            2 * (m * k + n * k + m * n),
            spec(m, n),
            lambda math: math.linear(x, weight),
            flops=2 * m * n * k,
        )

    def gemm_fp8(self, x: Tensor, weight: Fp8Weight, *, partial: bool = False) -> Tensor:
        """[T, K] bf16, quantised in blocks of 1 x 128, x FP8 [N, K] -> [T, N]."""
        m, k = x.shape
        self._quantise(x)
        return self._kernel(
            self._call(T.GEMM_NT_F8F8BF16, m, weight.n, k, 1),
            spec(m, weight.n),
            lambda math: math.gemm_fp8(x, weight, partial=partial),
        )

    def gemm_bf16_fp32(self, x: Tensor, weight: Tensor) -> Tensor:
        """[T, K] x [N, K] -> [T, N] fp32.

        Only the DeepGEMM algorithm is a kernel call: the others use precompiled kernels.
        """
        m, k = x.shape
        n, algo = weight.shape[0], self.bf16_fp32_algo
        shape = spec(m, n, dtype="fp32")
        if algo is Bf16Fp32Algo.DEEP_GEMM:
            call = self._call(T.GEMM_NT_BF16BF16F32, m, n, k, 1)
            return self._kernel(call, shape, lambda math: math.gemm_bf16_fp32(x, weight, algo))
        return self._compute(
            "linear_bf16_fp32",
            2 * (m * k + n * k) + 4 * m * n,
            shape,
            lambda math: math.gemm_bf16_fp32(x, weight, algo),
            flops=2 * m * n * k,
        )

    def einsum_fp8(self, x: Tensor, weight: Fp8Weight) -> Tensor:
        """``bhr,hdr->bhd``: [T, G, R] bf16, quantised along R, x FP8 [G, D, R] -> [T, G, D]."""
        m, groups, k = x.shape
        self._quantise(x)
        return self._kernel(
            self._call(T.FP8_EINSUM_BHR_HDR_BHD, m, weight.n, k, groups),
            spec(m, groups, weight.n),
            lambda math: math.einsum_fp8(x, weight),
        )

    def hc_prenorm(self, x: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
        """Hyper-connection GEMM: [T, M * H] x fp32 [24, M * H].

        Returns:
            Products [splits, T, 24] and sums of squares [splits, T], both fp32. The caller sums
            them over the splits.
        """
        m, k = x.shape
        n, splits = fn.shape[0], hc_num_splits(m, k, self.num_sms)
        return self._kernel(
            self._call(T.TF32_HC_PRENORM_GEMM, m, n, k, splits),
            (spec(splits, m, n, dtype="fp32"), spec(splits, m, dtype="fp32")),
            lambda math: math.hc_prenorm(x, fn, splits),
        )

    def experts_gemm(
        self, dispatched: Dispatched, weight: Fp8Weight, *, partial: bool = False
    ) -> Tensor:
        """Grouped GEMM over the local experts, contiguous or masked like the tokens' layout.

        [rows, K] x FP8 [E, N, K] -> [rows, N], or [E, rows, K] -> [E, rows, N]; rows without a
        token are undefined.
        """
        *rows, k = dispatched.x.shape
        self._quantise(dispatched.x)
        masked = len(rows) == 2
        kind = T.GROUPED_GEMM_NT_F8F8BF16_MASKED if masked else T.GROUPED_GEMM_NT_F8F8BF16_CONTIG
        return self._kernel(
            self._call(kind, dispatched.expected_m, weight.n, k, weight.groups),
            spec(*rows, weight.n),
            lambda math: math.experts_gemm(dispatched, weight, partial=partial),
        )
