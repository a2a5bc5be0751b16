"""DSV4 attention: low-rank projections, compressor and indexer, grouped output projection."""

from __future__ import annotations

from typing import Any

from runner.backend.forward_batch import ForwardBatch
from runner.backend.math import Tokens
from runner.backend.weights import WeightRequest
from runner.config.model import Dsv4Config
from runner.model.context import RankContext
from runner.model.operations import OperationState

NONPAGED_MIN_QUERY_TOKENS = 8192
"""From this many query tokens of a single prompt on, SGLang 0.5.23 scores without pages."""


class Compressor:
    """Pools ``ratio`` tokens into one key-value entry; the projections are cached per token.

    Ratio 4 overlaps with the block before, so each token has a second set of projections.
    """

    def __init__(
        self, ctx: RankContext, config: Dsv4Config, layer: int, name: str, head_dim: int
    ) -> None:
        self._ctx, self._layer, self._name = ctx, layer, name
        ratio = config.compress_ratio(layer)
        overlap = 2 if ratio == 4 else 1
        hidden, width = config.hidden_size, overlap * head_dim
        self._wkv_gate = ctx.replicated(
            layer, f"{name}_wkv_gate", "bf16", 2 * width, hidden, scale=hidden**-0.5
        )
        self.ape = ctx.replicated(layer, f"{name}_ape", "fp32", ratio, width, scale=0.1)
        self.norm = ctx.replicated(layer, f"{name}_norm", "bf16", head_dim, scale=0.1, mean=1.0)

    def store(self, x: Any, tokens: Tokens) -> None:
        """Project [T, H] and put the projections of all the batch's new tokens into the cache."""
        raw = self._ctx.backend.gemm_bf16_fp32(x, self._wkv_gate)
        raw = self._ctx.gather_tokens(self._name, raw, tokens.batch)
        everyone = Tokens(tokens.batch, 0, tokens.batch.num_tokens)
        self._ctx.backend.store_compressor(self._name, raw, everyone, self._layer)


class Indexer:
    """Scores compressed entries and picks the ``index_topk`` best for each token."""

    def __init__(self, ctx: RankContext, config: Dsv4Config, layer: int) -> None:
        self._ctx, self._config, self._layer = ctx, config, layer
        width = config.index_n_heads * config.index_head_dim
        self._wq_b = ctx.replicated(
            layer, "index_wq_b", "fp8", width, config.q_lora_rank, scale=config.q_lora_rank**-0.5
        )
        self._weights_proj = ctx.replicated(
            layer,
            "index_weights",
            "bf16",
            config.index_n_heads,
            config.hidden_size,
            scale=config.hidden_size**-0.5,
        )
        self._compressor = Compressor(ctx, config, layer, "index_compressor", config.index_head_dim)

    def select(self, x: Any, q_lora: Any, tokens: Tokens, metadata: Any) -> Any:
        """[T, entries] bool: what each token attends to besides its window."""
        backend, config = self._ctx.backend, self._config
        self._compressor.store(x, tokens)
        q = backend.index_query(backend.gemm_fp8(q_lora, self._wq_b), tokens, self._layer, config)
        weights = backend.linear(x, self._weights_proj)
        scores = backend.mqa_logits(
            q,
            weights,
            self._compressor.ape,
            self._compressor.norm,
            tokens,
            self._layer,
            config,
            metadata,
        )
        return backend.top_entries(scores, tokens, config)


class Dsv4Attention:
    """One layer's attention as two operations, with an all-reduce at its end."""

    def __init__(self, ctx: RankContext, config: Dsv4Config, layer: int) -> None:
        self._ctx, self._config, self._layer = ctx, config, layer
        hidden, rank, dim = config.hidden_size, config.q_lora_rank, config.head_dim
        self._wqkv_a = ctx.replicated(
            layer, "wqkv_a", "fp8", rank + dim, hidden, scale=hidden**-0.5
        )
        self._q_norm = ctx.replicated(layer, "q_norm", "bf16", rank, scale=0.1, mean=1.0)
        self._kv_norm = ctx.replicated(layer, "kv_norm", "bf16", dim, scale=0.1, mean=1.0)
        first, last = ctx.attn_shard(config.num_attention_heads)
        self._heads = last - first
        self._wq_b = ctx.make(
            WeightRequest(
                layer,
                "wq_b",
                "fp8",
                (config.num_attention_heads, dim, rank),
                ((first, last), (0, dim), (0, rank)),
                (self._heads * dim, rank),
                scale=rank**-0.5,
            )
        )
        self._sink = ctx.make(
            WeightRequest(
                layer,
                "attn_sink",
                "fp32",
                (config.num_attention_heads,),
                ((first, last),),
                (self._heads,),
                scale=0.5,
            )
        )
        self._groups, self._wo_a, self._wo_b = self._output_weights()
        ratio = config.compress_ratio(layer)
        self._compressor = Compressor(ctx, config, layer, "compressor", dim) if ratio else None
        self._indexer = Indexer(ctx, config, layer) if ratio == 4 else None

    def _output_weights(self) -> tuple[int, Any, Any]:
        ctx, config, layer = self._ctx, self._config, self._layer
        per_group = config.num_attention_heads * config.head_dim // config.o_groups
        first, last = ctx.attn_shard(config.o_groups)
        groups, lora, hidden = last - first, config.o_lora_rank, config.hidden_size
        wo_a = WeightRequest(
            layer,
            "wo_a",
            "fp8",
            (config.o_groups, lora, per_group),
            ((first, last), (0, lora), (0, per_group)),
            (groups, lora, per_group),
            scale=per_group**-0.5,
        )
        inner = config.o_groups * lora
        wo_b = WeightRequest(
            layer,
            "wo_b",
            "fp8",
            (hidden, inner),
            ((0, hidden), (first * lora, last * lora)),
            (hidden, groups * lora),
            scale=inner**-0.5,
        )
        return groups, ctx.make(wo_a), ctx.make(wo_b)

    def prepare(self, state: OperationState) -> None:
        """sublayer_input [T, H] -> q [T, h, D] and the entries it may see; fills the cache."""
        backend, config, layer = self._ctx.backend, self._config, self._layer
        x, batch = state.take("sublayer_input"), state.peek("batch")
        tokens = self._ctx.tokens(batch)
        q_lora, kv = backend.columns(
            backend.gemm_fp8(x, self._wqkv_a), config.q_lora_rank, config.head_dim
        )
        q_lora = backend.rms_norm(q_lora, self._q_norm, config.rms_norm_eps)
        q = backend.q_norm_rope(backend.gemm_fp8(q_lora, self._wq_b), tokens, layer, config)
        self._store_kv(kv, batch)
        if self._compressor:
            self._compressor.store(x, tokens)
        selected = None
        if self._indexer:
            selected = self._indexer.select(x, q_lora, tokens, state.peek("index_metadata"))
        state.put(q=q, selected=selected)

    def _store_kv(self, kv: Any, batch: ForwardBatch) -> None:
        everyone = Tokens(batch, 0, batch.num_tokens)
        kv = self._ctx.gather_tokens("kv", kv, batch)
        self._ctx.backend.store_kv(kv, self._kv_norm, everyone, self._layer, self._config)

    def core(self, state: OperationState) -> None:
        """q -> sublayer_output [T, H]: attention, grouped projection, sum over ranks."""
        ctx, backend = self._ctx, self._ctx.backend
        tokens = ctx.tokens(state.peek("batch"))
        ape, norm = (
            (self._compressor.ape, self._compressor.norm) if self._compressor else (None, None)
        )
        out = backend.attention(
            state.take("q"),
            state.take("selected"),
            ape,
            norm,
            self._sink,
            tokens,
            self._layer,
            self._config,
        )
        grouped = backend.einsum_fp8(backend.group_heads(out, self._groups), self._wo_a)
        partial = backend.gemm_fp8(backend.flatten_heads(grouped), self._wo_b, partial=True)
        output = ctx.sum_hidden("attention output", partial, ctx.attn_tp_group, state.peek("batch"))
        state.put(sublayer_output=output)
