"""Attention in torch: rotary embedding, compressed entries, window and latent attention.

Formulas: docs/models.md. Work is done in wide floats over chunks of tokens, so that gathered
keys stay within a fixed budget of memory.
"""

from __future__ import annotations

import torch

from runner.backend.forward_batch import ForwardBatch
from runner.backend.math import Tokens
from runner.backend.quantise import widen
from runner.backend.torch_cache import KVCache, Places, cache_of, places_of
from runner.config.model import Dsv3Config, Dsv4Config

_CHUNK_ELEMENTS = 1 << 26


def rotate(
    x: torch.Tensor, position: torch.Tensor, theta: float, *, inverse: bool = False
) -> torch.Tensor:
    """Rotate interleaved pairs of the last dimension by position; keeps the element type.

    Args:
        x: [T, ..., even].
        position: [T].
        theta: base of the frequencies.
        inverse: rotate back.
    """
    half = x.shape[-1] // 2
    steps = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angle = position.float().unsqueeze(-1) * theta**-steps
    angle = (-angle if inverse else angle).view(-1, *(1,) * (x.dim() - 2), half)
    even, odd = x.float().unflatten(-1, (half, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def rotate_tail(
    x: torch.Tensor, position: torch.Tensor, width: int, theta: float, *, inverse: bool = False
) -> torch.Tensor:
    """Rotate the last ``width`` columns only."""
    head, tail = x[..., :-width], x[..., -width:]
    return torch.cat((head, rotate(tail, position, theta, inverse=inverse)), -1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, in fp32, in x's element type."""
    wide = widen(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide if weight is None else wide * widen(weight)).to(x.dtype)


def rope_theta(config: Dsv4Config, layer: int) -> float:
    """Base of the rotary frequencies: layers with compression have their own."""
    return config.compress_rope_theta if config.compress_ratio(layer) else config.rope_theta


def pooled_entries(
    batch: ForwardBatch,
    layer: int,
    name: str,
    ape: torch.Tensor,
    norm: torch.Tensor,
    entries: int,
    config: Dsv4Config,
) -> torch.Tensor:
    """Compressed entries of every sequence from its cached projections.

    Entry n pools tokens [n * ratio, (n + 1) * ratio) with a softmax per channel over
    ``score + ape``; at ratio 4 the block before takes part through the overlap halves. Entries
    of unfinished blocks are meaningless and must be masked.

    Args:
        ape: [ratio, width] fp32, width = 2 * head_dim at ratio 4, else head_dim.
        norm: [head_dim].

    Returns:
        [sequences, entries, head_dim] bf16, normed and rotated to its block's first position.
    """
    ratio, width = ape.shape
    raw = cache_of(batch).read(layer, name)
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


def _with_overlap(values: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Join each block's own halves with the overlap halves of the block before."""
    half = values.shape[-1] // 2
    before_values = torch.zeros_like(values[..., :half])
    before_values[:, 1:] = values[:, :-1, :, :half]
    before_scores = torch.full_like(scores[..., :half], float("-inf"))
    before_scores[:, 1:] = scores[:, :-1, :, :half]
    joined_values = torch.cat((before_values, values[..., half:]), 2)
    return joined_values, torch.cat((before_scores, scores[..., half:]), 2)


def sparse_attention(
    q: torch.Tensor,
    compressed: torch.Tensor | None,
    selected: torch.Tensor | None,
    sink: torch.Tensor,
    tokens: Tokens,
    layer: int,
    config: Dsv4Config,
) -> torch.Tensor:
    """Softmax over window rows, compressed entries and a sink; output rotated back.

    Args:
        q: [T, h, D].
        compressed: [sequences, entries, D], or None in layers without compression.
        selected: [T, entries] bool at ratio 4, None elsewhere.
        sink: [h] fp32 logits of a virtual key without value.
    """
    ratio = config.compress_ratio(layer)
    keys = cache_of(tokens.batch).read(layer, "kv")
    places = places_of(tokens)
    window = min(config.sliding_window, keys.shape[1])
    entries = 0 if compressed is None else compressed.shape[1]
    step = max(1, _CHUNK_ELEMENTS // ((window + entries) * keys.shape[2]))
    out = torch.empty_like(q)
    for start in range(0, q.shape[0], step):
        part = slice(start, start + step)
        at = Places(places.sequence[part], places.position[part])
        rows, visible = _window_rows(keys, at, window)
        if compressed is not None:
            rows = torch.cat((rows, compressed[at.sequence]), 1)
            chosen = (
                selected[part] if selected is not None else finished(at.position, entries, ratio)
            )
            visible = torch.cat((visible, chosen), 1)
        out[part] = _attend(q[part], rows, visible, sink)
    theta = rope_theta(config, layer)
    return rotate_tail(out, places.position, config.qk_rope_head_dim, theta, inverse=True)


def finished(position: torch.Tensor, entries: int, ratio: int) -> torch.Tensor:
    """[T, entries] bool: entries whose block ends at or before the token."""
    index = torch.arange(entries, device=position.device)
    return index < ((position + 1) // ratio).unsqueeze(1)


def _window_rows(keys: torch.Tensor, at: Places, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    index = at.position.unsqueeze(1) - torch.arange(window, device=keys.device)
    return keys[at.sequence.unsqueeze(1), index.clamp_min(0)], index >= 0


def _attend(
    q: torch.Tensor, rows: torch.Tensor, visible: torch.Tensor, sink: torch.Tensor
) -> torch.Tensor:
    wide = widen(rows)
    scores = torch.einsum("thd,tkd->thk", widen(q), wide) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible.unsqueeze(1), float("-inf"))
    with_sink = torch.cat((scores, widen(sink).view(1, -1, 1).expand(len(q), -1, 1)), -1)
    weights = with_sink.softmax(-1)[..., :-1]
    return torch.einsum("thk,tkd->thd", weights, wide).to(q.dtype)


def mla_extend(
    q: torch.Tensor, kv: torch.Tensor, tokens: Tokens, layer: int, config: Dsv3Config
) -> torch.Tensor:
    """Causal multi-head attention of new prompts over themselves.

    Args:
        q: [T, h * (nope + rope)] of this rank's tokens.
        kv: [all tokens, h * (nope + v)].
    """
    batch, cache = tokens.batch, cache_of(tokens.batch)
    every, own = cache.places(batch), places_of(tokens)
    nope, rope, v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    longest = max(batch.seq_lens)
    query = rotate_tail(q.unflatten(-1, (-1, nope + rope)), own.position, rope, config.rope_theta)
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


def _grid(rows: torch.Tensor, at: Places, sequences: int, longest: int) -> torch.Tensor:
    """[T, h, d] -> [sequences, h, longest, d], zero where there is no token."""
    grid = torch.zeros((sequences, longest, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    grid[at.sequence, at.position] = rows
    return grid.transpose(1, 2)


def mla_decode(
    q: torch.Tensor,
    w_kc: torch.Tensor,
    w_vc: torch.Tensor,
    tokens: Tokens,
    layer: int,
    config: Dsv3Config,
) -> torch.Tensor:
    """Attention of one token a sequence over cached latents, projections absorbed.

    Args:
        q: [T, h * (nope + rope)].
        w_kc: [h, nope, kv_lora].
        w_vc: [h, v, kv_lora].
    """
    cache: KVCache = cache_of(tokens.batch)
    at = places_of(tokens)
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    query = rotate_tail(q.unflatten(-1, (-1, nope + rope)), at.position, rope, config.rope_theta)
    absorbed = torch.einsum("thn,hnc->thc", widen(query[..., :nope]), widen(w_kc))
    whole = torch.cat((absorbed, widen(query[..., nope:])), -1)
    rows = widen(cache.read(layer, "latent")[at.sequence])
    scores = torch.einsum("thc,tlc->thl", whole, rows) * (nope + rope) ** -0.5
    hidden = torch.arange(rows.shape[1], device=q.device) > at.position.unsqueeze(1)
    weights = scores.masked_fill(hidden.unsqueeze(1), float("-inf")).softmax(-1)
    mixed = torch.einsum("thl,tlc->thc", weights, rows[..., : config.kv_lora_rank])
    return torch.einsum("thc,hvc->thv", mixed, widen(w_vc)).flatten(1).to(q.dtype)
