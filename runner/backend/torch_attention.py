"""Attention in torch: rotary embedding, compressed entries, window and latent attention.

Formulas: docs/models.md. Computes in wide floats, over chunks of tokens so that gathered keys stay
within a fixed amount of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runner.backend.forward_batch import LayerTokens, Tokens
from runner.backend.tensor import Fp8Weight, PoolWeights
from runner.backend.torch_cache import Places, cache_of, places_of
from runner.config.model import Dsv3Config, Dsv4Config
from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper
from runner.deep_gemm_wrapper.quantise import (
    PAGE,
    dequantise_blocks,
    pack_pages,
    quantise_tokens,
    widen,
)

_CHUNK_ELEMENTS = 1 << 26


class AttentionMath:
    """Math of ``AttentionSteps``, except hyper-connections; see the steps for shapes."""

    def __init__(self, device: torch.device, gemms: DeepGemmWrapper) -> None:
        self._device, self._gemms = device, gemms

    # -- DSV4 -----------------------------------------------------------------------------------

    def q_norm_rope(self, q: Tensor, at: LayerTokens[Dsv4Config]) -> Tensor:
        heads = q.unflatten(-1, (-1, at.config.head_dim))
        return _rotate_tokens(rms_norm(heads, None, at.config.rms_norm_eps), at)

    def store_kv(self, kv: Tensor, weight: Tensor, at: LayerTokens[Dsv4Config]) -> None:
        rows = _rotate_tokens(rms_norm(kv, weight, at.config.rms_norm_eps), at)
        self.store_compressor("kv", rows, at)

    def store_compressor(self, name: str, raw: Tensor, at: LayerTokens[Dsv4Config]) -> None:
        cache_of(at.tokens.batch).write(at.layer, name, raw, places_of(at.tokens))

    def index_query(self, q: Tensor, at: LayerTokens[Dsv4Config]) -> Tensor:
        heads = q.unflatten(-1, (at.config.index_n_heads, at.config.index_head_dim))
        return _rotate_tokens(heads, at)

    def paged_mqa_metadata(self, tokens: Tokens, num_sms: int) -> Tensor:
        lens = _index_lens(tokens).unsqueeze(1)
        return self._gemms.get_paged_mqa_logits_metadata(lens, PAGE, num_sms)

    def mqa_logits(
        self,
        q: Tensor,
        weights: Tensor,
        pool: PoolWeights,
        at: LayerTokens[Dsv4Config],
        metadata: Tensor | None,
    ) -> Tensor:
        tokens, config = at.tokens, at.config
        entries = tokens.batch.compressed_entries(4)
        keys = pooled_entries("index_compressor", pool, entries, at)
        keys = torch.nn.functional.pad(keys, (0, 0, 0, -entries % PAGE))
        k_values, k_scales = quantise_tokens(keys)
        q_values, q_scales = quantise_tokens(q)
        scale = config.index_head_dim**-0.5 * config.index_n_heads**-0.5
        head_weights = weights.float() * q_scales.squeeze(-1) * scale
        lens, padded = _index_lens(tokens), keys.shape[1]
        if metadata is None:
            zeros = torch.zeros_like(lens)
            kv = (k_values[0], k_scales[0].squeeze(-1).contiguous())
            logits = self._gemms.fp8_mqa_logits(q_values, kv, head_weights, zeros, lens, padded)
            return logits[:, :entries]
        pages = pack_pages(k_values.flatten(0, 1), k_scales.flatten(0, 1).squeeze(-1))
        per_sequence = padded // PAGE
        first = places_of(tokens).sequence.unsqueeze(1) * per_sequence
        table = (first + torch.arange(per_sequence, device=self._device)).to(torch.int32)
        logits = self._gemms.fp8_paged_mqa_logits(
            q_values.unsqueeze(1), pages, head_weights, lens.unsqueeze(1), table, metadata, padded
        )
        return logits[:, :entries]

    def top_entries(self, scores: Tensor, at: LayerTokens[Dsv4Config]) -> Tensor:
        allowed = finished(places_of(at.tokens).position, scores.shape[1], 4)
        ranked = scores.masked_fill(~allowed, float("-inf"))
        best = ranked.topk(min(at.config.index_topk, scores.shape[1]), -1).indices
        chosen = torch.zeros_like(allowed)
        return chosen.scatter_(1, best, True) & allowed

    def attention(
        self,
        q: Tensor,
        selected: Tensor | None,
        pool: PoolWeights | None,
        sink: Tensor,
        at: LayerTokens[Dsv4Config],
    ) -> Tensor:
        tokens, layer, config = at
        ratio, places = config.compress_ratio(layer), places_of(tokens)
        keys = cache_of(tokens.batch).read(layer, "kv")
        window = min(config.sliding_window, keys.shape[1])
        entries = max(tokens.batch.seq_lens) // ratio if ratio else 0
        compressed = pooled_entries("compressor", pool, entries, at) if entries and pool else None
        step = max(1, _CHUNK_ELEMENTS // ((window + entries) * keys.shape[2]))
        out = torch.empty_like(q)
        for start in range(0, q.shape[0], step):
            part = slice(start, start + step)
            sequence, position = places.sequence[part], places.position[part]
            index = position.unsqueeze(1) - torch.arange(window, device=keys.device)
            rows, visible = keys[sequence.unsqueeze(1), index.clamp_min(0)], index >= 0
            if compressed is not None:
                rows = torch.cat((rows, compressed[sequence]), 1)
                ended = finished(position, entries, ratio)
                chosen = ended if selected is None else selected[part]
                visible = torch.cat((visible, chosen), 1)
            out[part] = _attend(q[part], rows, visible, sink)
        theta = rope_theta(config, layer)
        return rotate_tail(out, places.position, config.qk_rope_head_dim, theta, inverse=True)

    # -- DSV3 -----------------------------------------------------------------------------------

    def mla_absorbed(self, weight: Fp8Weight, config: Dsv3Config) -> tuple[Tensor, Tensor]:
        nope, v_dim = config.qk_nope_head_dim, config.v_head_dim
        full = dequantise_blocks(*weight.pair).to(torch.bfloat16)
        heads = full.unflatten(0, (-1, nope + v_dim))
        return heads[:, :nope].contiguous(), heads[:, nope:].contiguous()

    def mla_store(self, latent: Tensor, weight: Tensor, at: LayerTokens[Dsv3Config]) -> Tensor:
        tokens, layer, config = at
        places, rope = places_of(tokens), config.qk_rope_head_dim
        normed = rms_norm(latent[:, :-rope], weight, config.rms_norm_eps)
        rotated = rotate(latent[:, -rope:], places.position, config.rope_theta)
        rows = torch.cat((normed, rotated), 1)
        cache_of(tokens.batch).write(layer, "latent", rows, places)
        return normed

    def mla_extend(self, q: Tensor, kv: Tensor, at: LayerTokens[Dsv3Config]) -> Tensor:
        tokens, layer, config = at
        batch, cache = tokens.batch, cache_of(tokens.batch)
        every, own = cache.places(batch), places_of(tokens)
        nope, rope, v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        longest = max(batch.seq_lens)
        query = rotate_tail(
            q.unflatten(-1, (-1, nope + rope)), own.position, rope, config.rope_theta
        )
        keys_values = kv.unflatten(-1, (-1, nope + v_dim))
        k_rope = cache.read(layer, "latent")[every.sequence, every.position, -rope:]
        shared = k_rope.unsqueeze(1).expand(-1, keys_values.shape[1], -1)
        key = torch.cat((keys_values[..., :nope], shared), -1)
        sequences = batch.batch_size
        out = torch.nn.functional.scaled_dot_product_attention(
            widen(_grid(query, own, sequences, longest)),
            widen(_grid(key, every, sequences, longest)),
            widen(_grid(keys_values[..., nope:], every, sequences, longest)),
            is_causal=True,
        )
        return out.transpose(1, 2)[own.sequence, own.position].flatten(1).to(q.dtype)

    def mla_decode(
        self, q: Tensor, absorbed: tuple[Tensor, Tensor], at: LayerTokens[Dsv3Config]
    ) -> Tensor:
        (tokens, layer, config), (w_kc, w_vc) = at, absorbed
        cache, places = cache_of(tokens.batch), places_of(tokens)
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        query = rotate_tail(
            q.unflatten(-1, (-1, nope + rope)), places.position, rope, config.rope_theta
        )
        by_latent = torch.einsum("thn,hnc->thc", widen(query[..., :nope]), widen(w_kc))
        whole = torch.cat((by_latent, widen(query[..., nope:])), -1)
        rows = widen(cache.read(layer, "latent")[places.sequence])
        scores = torch.einsum("thc,tlc->thl", whole, rows) * (nope + rope) ** -0.5
        hidden = torch.arange(rows.shape[1], device=q.device) > places.position.unsqueeze(1)
        weights = scores.masked_fill(hidden.unsqueeze(1), float("-inf")).softmax(-1)
        mixed = torch.einsum("thl,tlc->thc", weights, rows[..., : config.kv_lora_rank])
        return torch.einsum("thc,hvc->thv", mixed, widen(w_vc)).flatten(1).to(q.dtype)


def rotate(x: Tensor, position: Tensor, theta: float, *, inverse: bool = False) -> Tensor:
    """Rotate interleaved pairs of [T, ..., even] by position [T]; keeps the element type."""
    half = x.shape[-1] // 2
    steps = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angle = position.float().unsqueeze(-1) * theta**-steps
    angle = (-angle if inverse else angle).view(-1, *(1,) * (x.dim() - 2), half)
    even, odd = x.float().unflatten(-1, (half, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def rotate_tail(
    x: Tensor, position: Tensor, width: int, theta: float, *, inverse: bool = False
) -> Tensor:
    """Rotate the last ``width`` columns only."""
    head, tail = x[..., :-width], x[..., -width:]
    return torch.cat((head, rotate(tail, position, theta, inverse=inverse)), -1)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, computed wide, returned in x's type."""
    wide = widen(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide if weight is None else wide * widen(weight)).to(x.dtype)


def rope_theta(config: Dsv4Config, layer: int) -> float:
    """Base of the rotary frequencies; layers with compression use a different one."""
    return config.compress_rope_theta if config.compress_ratio(layer) else config.rope_theta


def _rotate_tokens(x: Tensor, at: LayerTokens[Dsv4Config]) -> Tensor:
    position, theta = places_of(at.tokens).position, rope_theta(at.config, at.layer)
    return rotate_tail(x, position, at.config.qk_rope_head_dim, theta)


def _index_lens(tokens: Tokens) -> Tensor:
    """Number of entries to score each token against; the kernels need at least one."""
    return ((places_of(tokens).position + 1) // 4).clamp_min(1).to(torch.int32)


def pooled_entries(
    name: str, pool: PoolWeights, entries: int, at: LayerTokens[Dsv4Config]
) -> Tensor:
    """Compressed entries of every sequence from its cached projections.

    Entry n pools tokens [n * ratio, (n + 1) * ratio) with a softmax per channel over
    ``score + ape``. At ratio 4 the previous block takes part through the overlap halves, and
    ``width`` is 2 * head_dim. Entries of unfinished blocks are meaningless; the caller masks them.

    Returns:
        [sequences, entries, head_dim] bf16, normed and rotated to the block's first position.
    """
    (tokens, layer, config), (ape, norm) = at, pool
    ratio, width = ape.shape
    raw = cache_of(tokens.batch).read(layer, name)
    raw = torch.nn.functional.pad(raw, (0, 0, 0, max(0, entries * ratio - raw.shape[1])))
    blocks = raw[:, : entries * ratio].unflatten(1, (entries, ratio))
    values, scores = blocks[..., :width], blocks[..., width:] + ape
    if ratio == 4:
        values, scores = _with_overlap(values, scores)
    pooled = (widen(values) * widen(scores).softmax(2)).sum(2).to(torch.bfloat16)
    pooled = rms_norm(pooled, norm, config.rms_norm_eps)
    first = torch.arange(entries, device=raw.device) * ratio
    theta = config.compress_rope_theta
    by_entry = rotate_tail(pooled.transpose(0, 1), first, config.qk_rope_head_dim, theta)
    return by_entry.transpose(0, 1)


def _with_overlap(values: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Join each block's own halves with the overlap halves of the previous block."""
    half = values.shape[-1] // 2
    before_values = torch.zeros_like(values[..., :half])
    before_values[:, 1:] = values[:, :-1, :, :half]
    before_scores = torch.full_like(scores[..., :half], float("-inf"))
    before_scores[:, 1:] = scores[:, :-1, :, :half]
    joined_values = torch.cat((before_values, values[..., half:]), 2)
    return joined_values, torch.cat((before_scores, scores[..., half:]), 2)


def finished(position: Tensor, entries: int, ratio: int) -> Tensor:
    """[T, entries] bool: whether the entry's block ends at or before the token."""
    index = torch.arange(entries, device=position.device)
    return index < ((position + 1) // ratio).unsqueeze(1)


def _attend(q: Tensor, rows: Tensor, visible: Tensor, sink: Tensor) -> Tensor:
    wide = widen(rows)
    scores = torch.einsum("thd,tkd->thk", widen(q), wide) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible.unsqueeze(1), float("-inf"))
    with_sink = torch.cat((scores, widen(sink).view(1, -1, 1).expand(len(q), -1, 1)), -1)
    weights = with_sink.softmax(-1)[..., :-1]
    return torch.einsum("thk,tkd->thd", weights, wide).to(q.dtype)


def _grid(rows: Tensor, at: Places, sequences: int, longest: int) -> Tensor:
    """[T, h, d] -> [sequences, h, longest, d], zero where there is no token."""
    grid = torch.zeros((sequences, longest, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    grid[at.sequence, at.position] = rows
    return grid.transpose(1, 2)
