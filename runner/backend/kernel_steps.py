"""Steps that call DeepGEMM, and work on kernels themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runner.backend.announcer import Announcer
from runner.backend.math import Dispatched, Tokens
from runner.backend.token_to_m import hc_num_splits
from runner.config.gemm_algo import Bf16Fp32Algo
from runner.config.model import Dsv4Config
from runner.kernels.kernel import Kernel
from runner.kernels.types import DeepGemmKernelType as T
from runner.schedule import BARRIER, EXCHANGE, Collective, KernelWork


class KernelSteps(Announcer):
    """GEMMs, indexer logits, and kernels apart from any call."""

    def gemm_fp8(self, x: Any, weight: Any, *, partial: bool = False) -> Any:
        """Dense FP8 GEMM; see :meth:`Math.gemm_fp8`."""
        m, k = x.shape
        self._quantise(x)
        call = self._call(T.GEMM_NT_F8F8BF16, m, weight.n, k, 1)
        return self._kernel(call, lambda: self.math.gemm_fp8(x, weight, partial=partial))

    def gemm_bf16_fp32(self, x: Any, weight: Any) -> Any:
        """bf16 GEMM with fp32 output; see :meth:`Math.gemm_bf16_fp32`.

        Only DeepGEMM's is a kernel call: the others' kernels come compiled with their libraries.
        """
        m, k = x.shape
        n = weight.shape[0]
        algo = self.bf16_fp32_algo

        def work() -> Any:
            return self.math.gemm_bf16_fp32(x, weight, algo)

        if algo is Bf16Fp32Algo.DEEP_GEMM:
            return self._kernel(self._call(T.GEMM_NT_BF16BF16F32, m, n, k, 1), work)
        traffic = 2 * (m * k + n * k) + 4 * m * n
        return self._compute("linear_bf16_fp32", traffic, work, flops=2 * m * n * k)

    def einsum_fp8(self, x: Any, weight: Any) -> Any:
        """Grouped output projection; see :meth:`Math.einsum_fp8`."""
        m, groups, k = x.shape
        self._quantise(x)
        call = self._call(T.FP8_EINSUM_BHR_HDR_BHD, m, weight.n, k, groups)
        return self._kernel(call, lambda: self.math.einsum_fp8(x, weight))

    def hc_prenorm(self, x: Any, fn: Any) -> Any:
        """Hyper-connection GEMM with splits; see :meth:`Math.hc_prenorm`."""
        m, k = x.shape
        splits = hc_num_splits(m, k, self.num_sms)
        call = self._call(T.TF32_HC_PRENORM_GEMM, m, fn.shape[0], k, splits)
        return self._kernel(call, lambda: self.math.hc_prenorm(x, fn, splits))

    def experts_gemm(self, dispatched: Dispatched, weight: Any, *, partial: bool = False) -> Any:
        """Grouped GEMM over the local experts, contiguous or masked as the tokens are laid out."""
        k = dispatched.x.shape[-1]
        self._quantise(dispatched.x)
        masked = len(dispatched.x.shape) == 3
        kind = T.GROUPED_GEMM_NT_F8F8BF16_MASKED if masked else T.GROUPED_GEMM_NT_F8F8BF16_CONTIG
        work = self.math.gemm_fp8_masked if masked else self.math.gemm_fp8_contiguous
        call = self._call(kind, dispatched.expected_m, weight.n, k, weight.groups)
        return self._kernel(call, lambda: work(dispatched, weight, partial=partial))

    def paged_mqa_metadata(self, tokens: Tokens) -> Any:
        """See :meth:`Math.paged_mqa_metadata`."""
        call = self._call(T.PAGED_MQA_LOGITS_METADATA, tokens.count, 1, 1, 1)
        return self._kernel(call, lambda: self.math.paged_mqa_metadata(tokens, self.gemm_sms))

    def mqa_logits(
        self,
        q: Any,
        weights: Any,
        ape: Any,
        norm: Any,
        tokens: Tokens,
        layer: int,
        config: Dsv4Config,
        metadata: Any,
    ) -> Any:
        """See :meth:`Math.mqa_logits`; paged where ``metadata`` is given."""
        m, heads, dim = q.shape
        self._quantise(q)
        paged = metadata is not None
        kind = T.FP8_PAGED_MQA_LOGITS if paged else T.FP8_MQA_LOGITS
        return self._kernel(
            self._call(kind, m, heads, dim, 1),
            lambda: self.math.mqa_logits(
                q, weights, ape, norm, tokens, layer, config, paged=paged, metadata=metadata
            ),
        )

    def build_kernels(self, kernels: tuple[Kernel, ...]) -> None:
        """See :meth:`KernelStore.build`."""
        self.sink.run(KernelWork("build", kernels), lambda: self.kernels.build(kernels))

    def verify_kernels(self, kernels: tuple[Kernel, ...]) -> None:
        """See :meth:`KernelStore.verify`."""
        self.sink.run(KernelWork("verify", kernels), lambda: self.kernels.verify(kernels))

    def load_kernels(self, kernels: tuple[Kernel, ...]) -> None:
        """See :meth:`KernelStore.load`."""
        self.sink.run(KernelWork("load", kernels), lambda: self.kernels.load(kernels))

    def barrier(self, group: tuple[int, ...]) -> None:
        """See :meth:`KernelStore.wait`; ``group`` is every rank."""
        self.sink.run(Collective(BARRIER, group, 0), self.kernels.wait)

    def capture(self, name: str, forward: Callable[[], Any]) -> None:
        """Capture a CUDA graph of ``forward``; its operations are counted, not announced."""
        self.sink.capture(name, forward)

    def exchange_kernels(self, group: tuple[int, ...], nbytes: int) -> None:
        """See :meth:`KernelStore.exchange`; every rank of ``group`` takes part."""
        self.sink.run(Collective(EXCHANGE, group, nbytes), self.kernels.exchange)
