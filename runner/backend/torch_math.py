"""``TorchMath``: the forward's steps in torch, on CPU or CUDA; GEMMs through entry points."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from runner.backend import torch_attention, torch_moe
from runner.backend.entry_points import EntryPoints
from runner.backend.forward_batch import ForwardBatch
from runner.backend.linear_bf16_fp32 import linear_bf16_fp32
from runner.backend.math import Dispatched, Routing, Tokens
from runner.backend.quantise import Fp8Weight, dequantise_blocks, in_slabs, quantise_tokens, widen
from runner.backend.reference import PAGE, pack_pages
from runner.backend.shapes import compressed_entries
from runner.backend.torch_cache import KVCache, cache_of, ids_of, last_places, places_of
from runner.config.gemm_algo import Bf16Fp32Algo
from runner.config.model import Dsv3Config, Dsv4Config, MoeConfig


class TorchMath:
    """Implements :class:`runner.backend.math.Math` on torch tensors."""

    def __init__(self, device: torch.device, gemms: EntryPoints) -> None:
        self._device, self._gemms = device, gemms
        # Kernels write bf16; the reference can keep partial sums whole until they are summed.
        self._partial = torch.float64 if device.type == "cpu" else torch.bfloat16

    def _out(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def gemm_sms(self, count: int | None) -> AbstractContextManager[None]:
        """See the protocol."""
        return self._gemms.configure_deep_gemm_num_sms(count)

    # -- plain steps ----------------------------------------------------------------------------

    def embed(self, tokens: Tokens, weight: torch.Tensor, first_row: int) -> torch.Tensor:
        """See the protocol."""
        ids = ids_of(tokens, self._device)
        local = ids - first_row
        inside = (local >= 0) & (local < weight.shape[0])
        rows = weight[local.clamp(0, weight.shape[0] - 1)]
        return torch.where(inside.unsqueeze(1), rows, torch.zeros_like(rows))

    def repeat(self, x: torch.Tensor, copies: int) -> torch.Tensor:
        """See the protocol."""
        return x.repeat(1, copies)

    def rows(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """See the protocol."""
        return x[start:stop]

    def padded(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """See the protocol."""
        short = rows - x.shape[0]
        return x[:rows] if short <= 0 else torch.cat([x, x.new_zeros(short, *x.shape[1:])])

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """See the protocol."""
        return torch.cat(list(parts))

    def sum_blocks(self, x: torch.Tensor, blocks: int) -> torch.Tensor:
        """See the protocol."""
        total: torch.Tensor = widen(x).unflatten(0, (blocks, -1)).sum(0)
        return total.to(x.dtype)

    def block_for_each(
        self, x: torch.Tensor, routing: Routing, ranks: int, per_rank: int
    ) -> torch.Tensor:
        """See the protocol."""
        return torch_moe.block_for_each(x, routing.ids, ranks, per_rank)

    def pack_routing(self, routing: Routing, tokens: int) -> torch.Tensor:
        """See the protocol."""
        return torch_moe.pack_routing(routing, tokens)

    def unpack_routing(self, packed: torch.Tensor) -> Routing:
        """See the protocol."""
        return torch_moe.unpack_routing(packed)

    def columns(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """See the protocol."""
        return x[:, start:stop].contiguous()

    def last_tokens(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """See the protocol."""
        return x[last_places(batch, x.device)]

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """See the protocol."""
        return logits.argmax(-1)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See the protocol."""
        return torch_attention.rms_norm(x, weight, eps)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See the protocol."""
        return x + y

    def round_hidden(self, x: torch.Tensor) -> torch.Tensor:
        """See the protocol."""
        return x.to(torch.bfloat16)

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See the protocol."""
        if x.device.type != "cpu":
            return torch.nn.functional.linear(x, weight)
        return torch.nn.functional.linear(widen(x), widen(weight)).to(x.dtype)

    # -- GEMMs ----------------------------------------------------------------------------------

    def gemm_fp8(
        self, x: torch.Tensor, weight: Fp8Weight, *, partial: bool = False
    ) -> torch.Tensor:
        """See the protocol."""
        out = self._out(x.shape[0], weight.n, dtype=self._dtype(partial=partial))
        self._gemms.gemm_nt_f8f8bf16(quantise_tokens(x), weight.pair, out)
        return out

    def gemm_bf16_fp32(
        self, x: torch.Tensor, weight: torch.Tensor, algo: Bf16Fp32Algo
    ) -> torch.Tensor:
        """See the protocol."""
        return linear_bf16_fp32(x, weight, algo, self._gemms)

    def einsum_fp8(self, x: torch.Tensor, weight: Fp8Weight) -> torch.Tensor:
        """See the protocol."""
        out = self._out(x.shape[0], weight.groups, weight.n)
        self._gemms.fp8_einsum_bhr_hdr_bhd(quantise_tokens(x), weight.pair, out)
        return out

    def _dtype(self, *, partial: bool) -> torch.dtype:
        return self._partial if partial else torch.bfloat16

    def gemm_fp8_contiguous(
        self, dispatched: Dispatched, weight: Fp8Weight, *, partial: bool = False
    ) -> torch.Tensor:
        """See the protocol."""
        out = self._out(dispatched.x.shape[0], weight.n, dtype=self._dtype(partial=partial))
        lhs = quantise_tokens(dispatched.x)
        self._gemms.grouped_gemm_nt_f8f8bf16_contig(lhs, weight.pair, out, dispatched.groups)
        return out

    def gemm_fp8_masked(
        self, dispatched: Dispatched, weight: Fp8Weight, *, partial: bool = False
    ) -> torch.Tensor:
        """See the protocol."""
        groups, rows, _ = dispatched.x.shape
        out = self._out(groups, rows, weight.n, dtype=self._dtype(partial=partial))
        lhs = quantise_tokens(dispatched.x)
        self._gemms.grouped_gemm_nt_f8f8bf16_masked(
            lhs, weight.pair, out, dispatched.groups, dispatched.expected_m
        )
        return out

    # -- hyper-connections ----------------------------------------------------------------------

    def hc_prenorm(
        self, x: torch.Tensor, fn: torch.Tensor, num_splits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the protocol."""
        out = self._out(num_splits, x.shape[0], fn.shape[0], dtype=torch.float32)
        squares = self._out(num_splits, x.shape[0], dtype=torch.float32)
        self._gemms.tf32_hc_prenorm_gemm(x, fn, out, squares, num_splits)
        return out, squares

    def hc_pre(
        self,
        x: torch.Tensor,
        gemm: Any,
        base: torch.Tensor,
        scale: torch.Tensor,
        config: Dsv4Config,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See the protocol; sinkhorn-normalised mixing as in DeepSeek-V4."""
        copies, eps = config.hc_mult, config.hc_eps
        out, squares = gemm
        mean_square = squares.sum(0) / x.shape[1]
        mix = out.sum(0) * torch.rsqrt(mean_square + config.rms_norm_eps).unsqueeze(1)
        pre, post, comb = mix.split((copies, copies, copies * copies), 1)
        base_pre, base_post, base_comb = base.split((copies, copies, copies * copies))
        pre = (pre * scale[0] + base_pre).sigmoid() + eps
        post = 2 * (post * scale[1] + base_post).sigmoid()
        comb = (comb * scale[2] + base_comb).unflatten(1, (copies, copies))
        mixed = (widen(pre).unsqueeze(-1) * widen(x).unflatten(1, (copies, -1))).sum(1)
        return mixed.to(x.dtype), post, _sinkhorn(comb, config.hc_sinkhorn_iters, eps)

    def hc_post(
        self, y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
    ) -> torch.Tensor:
        """See the protocol."""
        stream = widen(x).unflatten(1, (post.shape[1], -1))
        kept = torch.einsum("tji,tjh->tih", widen(comb), stream)
        added = widen(post).unsqueeze(-1) * widen(y).unsqueeze(1)
        return (kept + added).flatten(1).to(x.dtype)

    def hc_head(
        self,
        x: torch.Tensor,
        fn: torch.Tensor,
        base: torch.Tensor,
        scale: torch.Tensor,
        config: Dsv4Config,
    ) -> torch.Tensor:
        """See the protocol."""
        wide = widen(x)
        inverse = torch.rsqrt(wide.square().mean(1, keepdim=True) + config.rms_norm_eps)
        mix = (wide @ widen(fn).T) * inverse
        weights = (mix * widen(scale) + widen(base)).sigmoid() + config.hc_eps
        copies: torch.Tensor = wide.unflatten(1, (config.hc_mult, -1))
        return (weights.unsqueeze(-1) * copies).sum(1).to(x.dtype)

    # -- DSV4 attention -------------------------------------------------------------------------

    def q_norm_rope(
        self, q: torch.Tensor, tokens: Tokens, layer: int, config: Dsv4Config
    ) -> torch.Tensor:
        """See the protocol."""
        heads = q.unflatten(-1, (-1, config.head_dim))
        normed = torch_attention.rms_norm(heads, None, config.rms_norm_eps)
        return self._rotate_tail(normed, tokens, layer, config)

    def store_kv(
        self,
        kv: torch.Tensor,
        weight: torch.Tensor,
        tokens: Tokens,
        layer: int,
        config: Dsv4Config,
    ) -> None:
        """See the protocol."""
        normed = torch_attention.rms_norm(kv, weight, config.rms_norm_eps)
        rows = self._rotate_tail(normed, tokens, layer, config)
        cache_of(tokens.batch).write(layer, "kv", rows, places_of(tokens))

    def store_compressor(self, name: str, raw: torch.Tensor, tokens: Tokens, layer: int) -> None:
        """See the protocol."""
        cache_of(tokens.batch).write(layer, name, raw, places_of(tokens))

    def index_query(
        self, q: torch.Tensor, tokens: Tokens, layer: int, config: Dsv4Config
    ) -> torch.Tensor:
        """See the protocol."""
        heads = q.unflatten(-1, (config.index_n_heads, config.index_head_dim))
        return self._rotate_tail(heads, tokens, layer, config)

    def _rotate_tail(
        self, x: torch.Tensor, tokens: Tokens, layer: int, config: Dsv4Config
    ) -> torch.Tensor:
        theta = torch_attention.rope_theta(config, layer)
        position = places_of(tokens).position
        return torch_attention.rotate_tail(x, position, config.qk_rope_head_dim, theta)

    def paged_mqa_metadata(self, tokens: Tokens, num_sms: int) -> torch.Tensor:
        """See the protocol."""
        lens = self._index_lens(tokens).unsqueeze(1)
        return self._gemms.get_paged_mqa_logits_metadata(lens, PAGE, num_sms)

    def _index_lens(self, tokens: Tokens) -> torch.Tensor:
        """Entries each token is scored against; one at least, as the kernels want."""
        return ((places_of(tokens).position + 1) // 4).clamp_min(1).to(torch.int32)

    def mqa_logits(
        self,
        q: torch.Tensor,
        weights: torch.Tensor,
        ape: torch.Tensor,
        norm: torch.Tensor,
        tokens: Tokens,
        layer: int,
        config: Dsv4Config,
        *,
        paged: bool,
        metadata: Any,
    ) -> torch.Tensor:
        """See the protocol."""
        entries = compressed_entries(tokens.batch, 4)
        keys = torch_attention.pooled_entries(
            tokens.batch, layer, "index_compressor", ape, norm, entries, config
        )
        keys = torch.nn.functional.pad(keys, (0, 0, 0, -entries % PAGE))
        k_values, k_scales = quantise_tokens(keys)
        q_values, q_scales = quantise_tokens(q)
        scale = config.index_head_dim**-0.5 * config.index_n_heads**-0.5
        head_weights = weights.float() * q_scales.squeeze(-1) * scale
        lens = self._index_lens(tokens)
        if not paged:
            zeros = torch.zeros_like(lens)
            kv = (k_values[0], k_scales[0].squeeze(-1).contiguous())
            logits = self._gemms.fp8_mqa_logits(
                q_values, kv, head_weights, zeros, lens, keys.shape[1]
            )
            return logits[:, :entries]
        pages = pack_pages(k_values.flatten(0, 1), k_scales.flatten(0, 1).squeeze(-1))
        per_sequence = keys.shape[1] // PAGE
        first = places_of(tokens).sequence.unsqueeze(1) * per_sequence
        table = (first + torch.arange(per_sequence, device=self._device)).to(torch.int32)
        logits = self._gemms.fp8_paged_mqa_logits(
            q_values.unsqueeze(1),
            pages,
            head_weights,
            lens.unsqueeze(1),
            table,
            metadata,
            keys.shape[1],
        )
        return logits[:, :entries]

    def top_entries(self, scores: torch.Tensor, tokens: Tokens, config: Dsv4Config) -> torch.Tensor:
        """See the protocol."""
        allowed = torch_attention.finished(places_of(tokens).position, scores.shape[1], 4)
        ranked = scores.masked_fill(~allowed, float("-inf"))
        best = ranked.topk(min(config.index_topk, scores.shape[1]), -1).indices
        chosen = torch.zeros_like(allowed)
        return chosen.scatter_(1, best, True) & allowed

    def attention(
        self,
        q: torch.Tensor,
        selected: torch.Tensor | None,
        ape: torch.Tensor | None,
        norm: torch.Tensor | None,
        sink: torch.Tensor,
        tokens: Tokens,
        layer: int,
        config: Dsv4Config,
    ) -> torch.Tensor:
        """See the protocol."""
        compressed = None
        ratio = config.compress_ratio(layer)
        entries = max(tokens.batch.seq_lens) // ratio if ratio else 0
        if entries and ape is not None and norm is not None:
            compressed = torch_attention.pooled_entries(
                tokens.batch, layer, "compressor", ape, norm, entries, config
            )
        return torch_attention.sparse_attention(
            q, compressed, selected, sink, tokens, layer, config
        )

    def group_heads(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        """See the protocol."""
        return x.reshape(x.shape[0], groups, -1)

    def flatten_heads(self, x: torch.Tensor) -> torch.Tensor:
        """See the protocol."""
        return x.flatten(1)

    # -- DSV3 attention -------------------------------------------------------------------------

    def mla_absorbed(
        self, weight: Fp8Weight, config: Dsv3Config
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the protocol."""
        nope, v_dim = config.qk_nope_head_dim, config.v_head_dim
        full = dequantise_blocks(*weight.pair).to(torch.bfloat16)
        heads = full.unflatten(0, (-1, nope + v_dim))
        return heads[:, :nope].contiguous(), heads[:, nope:].contiguous()

    def mla_store(
        self,
        latent: torch.Tensor,
        weight: torch.Tensor,
        tokens: Tokens,
        layer: int,
        config: Dsv3Config,
    ) -> torch.Tensor:
        """See the protocol."""
        at, rope = places_of(tokens), config.qk_rope_head_dim
        normed = torch_attention.rms_norm(latent[:, :-rope], weight, config.rms_norm_eps)
        rotated = torch_attention.rotate(latent[:, -rope:], at.position, config.rope_theta)
        cache_of(tokens.batch).write(layer, "latent", torch.cat((normed, rotated), 1), at)
        return normed

    def mla_extend(
        self, q: torch.Tensor, kv: torch.Tensor, tokens: Tokens, layer: int, config: Dsv3Config
    ) -> torch.Tensor:
        """See the protocol."""
        return torch_attention.mla_extend(q, kv, tokens, layer, config)

    def mla_decode(
        self,
        q: torch.Tensor,
        w_kc: torch.Tensor,
        w_vc: torch.Tensor,
        tokens: Tokens,
        layer: int,
        config: Dsv3Config,
    ) -> torch.Tensor:
        """See the protocol."""
        return torch_attention.mla_decode(q, w_kc, w_vc, tokens, layer, config)

    # -- mixture of experts ---------------------------------------------------------------------

    def top_k(self, logits: torch.Tensor, bias: torch.Tensor, config: MoeConfig) -> Routing:
        """See the protocol."""
        return torch_moe.select(logits, bias, config)

    def hash_top_k(
        self, logits: torch.Tensor, table: torch.Tensor, tokens: Tokens, config: MoeConfig
    ) -> Routing:
        """See the protocol."""
        ids = ids_of(tokens, self._device)
        return torch_moe.select_by_table(logits, table[ids], config)

    def dispatch_contiguous(
        self, x: torch.Tensor, routing: Routing, experts: tuple[int, int], rows: int
    ) -> Dispatched:
        """See the protocol."""
        return torch_moe.dispatch_contiguous(x, routing.ids, experts, rows)

    def dispatch_masked(
        self,
        x: torch.Tensor,
        routing: Routing,
        experts: tuple[int, int],
        rows: int,
        expected_m: int,
    ) -> Dispatched:
        """See the protocol."""
        return torch_moe.dispatch_masked(x, routing.ids, experts, rows, expected_m)

    def silu_and_mul(self, x: torch.Tensor, limit: float) -> torch.Tensor:
        """See the protocol."""
        rows = in_slabs(x.reshape(-1, x.shape[-1]))
        return torch.cat([_silu_and_mul(part, limit) for part in rows]).view(*x.shape[:-1], -1)

    def combine(
        self, y: torch.Tensor, slots: torch.Tensor, routing: Routing, factor: float
    ) -> torch.Tensor:
        """See the protocol."""
        return torch_moe.combine(y, slots, routing, factor)


def _silu_and_mul(x: torch.Tensor, limit: float) -> torch.Tensor:
    gate, up = x.float().chunk(2, -1)
    if limit > 0:
        gate, up = gate.clamp_max(limit), up.clamp(-limit, limit)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def _sinkhorn(comb: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
    """Alternate row and column normalisation of [T, M, M]; the first rows by softmax."""
    comb = comb.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


class TorchBuffers:
    """Buffers of real tensors; implements :class:`runner.driver.model_runner.BufferSource`."""

    def __init__(self, device: torch.device, vocab_size: int) -> None:
        self._device, self._vocab_size = device, vocab_size

    def proxy(self, tokens: int, width: int) -> torch.Tensor:
        """Zeros [tokens, width] bf16, as SGLang's dummy proxies."""
        return torch.zeros((tokens, width), dtype=torch.bfloat16, device=self._device)

    def cache(self, sequences: int, max_len: int) -> KVCache:
        """An empty cache."""
        return KVCache(sequences, max_len, self._device)

    def dummy_ids(self, tokens: int) -> tuple[int, ...]:
        """Ids spread over the vocabulary, the same on every rank."""
        return tuple((17 + 7919 * i) % self._vocab_size for i in range(tokens))

    def read_ids(self, ids: torch.Tensor) -> tuple[int, ...]:
        """The tensor's numbers."""
        return tuple(ids.tolist())
