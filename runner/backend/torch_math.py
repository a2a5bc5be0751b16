"""``TorchMath``: computes the forward's steps in torch, on CPU or CUDA.

Each method does the work of the step with the same name in ``Backend``; see there for shapes.
GEMMs go through the entry points of ``DeepGemmWrapper``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from runner.backend.forward_batch import ForwardBatch, Tokens
from runner.backend.tensor import Dispatched, Fp8Weight, MixWeights
from runner.backend.torch_attention import AttentionMath, rms_norm
from runner.backend.torch_cache import KVCache, ids_of, last_places
from runner.backend.torch_moe import ExpertMath
from runner.config.environ import Bf16Fp32Algo
from runner.config.model import Dsv4Config
from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper
from runner.deep_gemm_wrapper.quantise import in_slabs, quantise_tokens, widen


class TorchMath(AttentionMath, ExpertMath):
    """The math of every step, with GEMMs from DeepGEMM or from our reference of it."""

    def __init__(self, device: torch.device, gemms: DeepGemmWrapper) -> None:
        super().__init__(device, gemms)
        # Kernels write bf16; the reference can keep partial results unrounded until the sum.
        partial = torch.float64 if device.type == "cpu" else torch.bfloat16
        self._output = {False: torch.bfloat16, True: partial}

    def _empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def gemm_sms(self, count: int | None) -> AbstractContextManager[None]:
        return self._gemms.configure_deep_gemm_num_sms(count)

    def zeros(self, tokens: int, width: int) -> Tensor:
        return torch.zeros((tokens, width), dtype=torch.bfloat16, device=self._device)

    def new_cache(self, sequences: int, max_len: int) -> KVCache:
        return KVCache(sequences, max_len, self._device)

    # -- plain steps ----------------------------------------------------------------------------

    def embed(self, tokens: Tokens, weight: Tensor, first_row: int) -> Tensor:
        local = ids_of(tokens, self._device) - first_row
        inside = (local >= 0) & (local < weight.shape[0])
        rows = weight[local.clamp(0, weight.shape[0] - 1)]
        return torch.where(inside.unsqueeze(1), rows, torch.zeros_like(rows))

    def padded(self, x: Tensor, rows: int) -> Tensor:
        short = rows - x.shape[0]
        return x[:rows] if short <= 0 else torch.cat([x, x.new_zeros(short, *x.shape[1:])])

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def last_tokens(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        return x[last_places(batch, x.device)]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def silu_and_mul(self, x: Tensor, limit: float) -> Tensor:
        parts = []
        for slab in in_slabs(x.reshape(-1, x.shape[-1])):
            gate, up = slab.float().chunk(2, -1)
            if limit > 0:
                gate, up = gate.clamp_max(limit), up.clamp(-limit, limit)
            parts.append((torch.nn.functional.silu(gate) * up).to(x.dtype))
        return torch.cat(parts).view(*x.shape[:-1], -1)

    # -- GEMMs ----------------------------------------------------------------------------------

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return torch.nn.functional.linear(x, weight)
        return torch.nn.functional.linear(widen(x), widen(weight)).to(x.dtype)

    def gemm_fp8(self, x: Tensor, weight: Fp8Weight, *, partial: bool) -> Tensor:
        out = self._empty(x.shape[0], weight.n, dtype=self._output[partial])
        self._gemms.gemm_nt_f8f8bf16(quantise_tokens(x), weight.pair, out)
        return out

    def gemm_bf16_fp32(self, x: Tensor, weight: Tensor, algo: Bf16Fp32Algo) -> Tensor:
        if algo is Bf16Fp32Algo.DEEP_GEMM:
            out = self._empty(x.shape[0], weight.shape[0], dtype=torch.float32)
            self._gemms.gemm_nt_bf16bf16f32(x, weight, out)
            return out
        if algo is Bf16Fp32Algo.TORCH:
            return torch.nn.functional.linear(x.float(), weight.float())
        # As in SGLang: torch supports ``out_dtype`` only on CUDA and for 16-bit operands.
        if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16:
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        return torch.mm(x.float(), weight.float().t())

    def einsum_fp8(self, x: Tensor, weight: Fp8Weight) -> Tensor:
        out = self._empty(x.shape[0], weight.groups, weight.n)
        self._gemms.fp8_einsum_bhr_hdr_bhd(quantise_tokens(x), weight.pair, out)
        return out

    def experts_gemm(self, dispatched: Dispatched, weight: Fp8Weight, *, partial: bool) -> Tensor:
        rows = dispatched.x.shape[:-1]
        out = self._empty(*rows, weight.n, dtype=self._output[partial])
        lhs, groups = quantise_tokens(dispatched.x), dispatched.groups
        if len(rows) == 1:
            self._gemms.grouped_gemm_nt_f8f8bf16_contig(lhs, weight.pair, out, groups)
        else:
            self._gemms.grouped_gemm_nt_f8f8bf16_masked(
                lhs, weight.pair, out, groups, dispatched.expected_m
            )
        return out

    # -- hyper-connections: formulas in docs/models.md --------------------------------------------

    def hc_prenorm(self, x: Tensor, fn: Tensor, num_splits: int) -> tuple[Tensor, Tensor]:
        out = self._empty(num_splits, x.shape[0], fn.shape[0], dtype=torch.float32)
        squares = self._empty(num_splits, x.shape[0], dtype=torch.float32)
        self._gemms.tf32_hc_prenorm_gemm(x, fn, out, squares, num_splits)
        return out, squares

    def hc_pre(
        self, x: Tensor, gemm: tuple[Tensor, Tensor], mix: MixWeights, config: Dsv4Config
    ) -> tuple[Tensor, Tensor, Tensor]:
        copies, eps = config.hc_mult, config.hc_eps
        (out, squares), (_, base, scale) = gemm, mix
        mean_square = squares.sum(0) / x.shape[1]
        mixed = out.sum(0) * torch.rsqrt(mean_square + config.rms_norm_eps).unsqueeze(1)
        pre, post, comb = mixed.split((copies, copies, copies * copies), 1)
        base_pre, base_post, base_comb = base.split((copies, copies, copies * copies))
        pre = (pre * scale[0] + base_pre).sigmoid() + eps
        post = 2 * (post * scale[1] + base_post).sigmoid()
        comb = (comb * scale[2] + base_comb).unflatten(1, (copies, copies))
        hidden = (widen(pre).unsqueeze(-1) * widen(x).unflatten(1, (copies, -1))).sum(1)
        return hidden.to(x.dtype), post, _sinkhorn(comb, config.hc_sinkhorn_iters, eps)

    def hc_post(self, y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        stream = widen(x).unflatten(1, (post.shape[1], -1))
        kept = torch.einsum("tji,tjh->tih", widen(comb), stream)
        added = widen(post).unsqueeze(-1) * widen(y).unsqueeze(1)
        return (kept + added).flatten(1).to(x.dtype)

    def hc_head(self, x: Tensor, mix: MixWeights, config: Dsv4Config) -> Tensor:
        wide, (fn, base, scale) = widen(x), mix
        inverse = torch.rsqrt(wide.square().mean(1, keepdim=True) + config.rms_norm_eps)
        mixed = (wide @ widen(fn).T) * inverse
        weights = (mixed * widen(scale) + widen(base)).sigmoid() + config.hc_eps
        copies: Tensor = wide.unflatten(1, (config.hc_mult, -1))
        return (weights.unsqueeze(-1) * copies).sum(1).to(x.dtype)


def _sinkhorn(comb: Tensor, iterations: int, eps: float) -> Tensor:
    """Normalise rows and columns of [T, M, M] in turns; the first row step is a softmax."""
    comb = comb.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb
