"""The DSV4 decoder: hyper-connections around compressed attention and around the experts.

Manifold-constrained hyper-connections keep several copies of the residual stream, mixed per token.
Before a sub-layer, one GEMM (``TF32_HC_PRENORM_GEMM``) of the flattened stream with a
[hc_mult * (2 + hc_mult), hc_mult * hidden] matrix computes the mixing weights; after the sub-layer
the stream is rebuilt. Formulas: docs/models.md.
"""

from __future__ import annotations

from runner.backend.forward_batch import ForwardBatch, LayerTokens, Tokens
from runner.backend.tensor import MixWeights, PoolWeights, Tensor, split_columns
from runner.config.model import Dsv4Config
from runner.model.context import RankContext
from runner.model.moe import make_experts
from runner.model.operations import LayerState, Operation

NONPAGED_MIN_QUERY_TOKENS = 8192
"""Query tokens of a single prompt from which SGLang 0.5.23 computes index scores without pages."""


class Compressor:
    """Pools ``ratio`` tokens into one key-value entry; the projections are cached per token.

    At ratio 4, blocks overlap with the previous one, so each token has two sets of projections.
    """

    def __init__(
        self, ctx: RankContext, config: Dsv4Config, layer: int, name: str, head_dim: int
    ) -> None:
        self._ctx, self._config, self._layer, self._name = ctx, config, layer, name
        ratio = config.compress_ratio(layer)
        width = head_dim * (2 if ratio == 4 else 1)
        self._wkv_gate = ctx.bf16(layer, f"{name}_wkv_gate", 2 * width, config.hidden_size)
        self.pool = PoolWeights(
            ctx.fp32(layer, f"{name}_ape", ratio, width, scale=0.1),
            ctx.norm(layer, f"{name}_norm", head_dim),
        )

    def store(self, x: Tensor, tokens: Tokens) -> None:
        """Project [T, H]; put the projections of all new tokens of the batch into the cache."""
        backend, batch = self._ctx.backend, tokens.batch
        raw = backend.gemm_bf16_fp32(x, self._wkv_gate)
        raw = self._ctx.gather_tokens(self._name, raw, batch)
        at = LayerTokens(batch.tokens, self._layer, self._config)
        backend.store_compressor(self._name, raw, at)


class Indexer:
    """Scores compressed entries and selects the ``index_topk`` best for each token."""

    def __init__(self, ctx: RankContext, config: Dsv4Config, layer: int) -> None:
        self._backend, self._config, self._layer = ctx.backend, config, layer
        heads, dim = config.index_n_heads, config.index_head_dim
        self._wq_b = ctx.fp8(layer, "index_wq_b", heads * dim, config.q_lora_rank)
        self._weights_proj = ctx.bf16(layer, "index_weights", heads, config.hidden_size)
        self._compressor = Compressor(ctx, config, layer, "index_compressor", dim)

    def select(self, x: Tensor, q_lora: Tensor, tokens: Tokens, metadata: Tensor | None) -> Tensor:
        """[T, entries] bool: the entries that each token attends to, besides its window."""
        backend, at = self._backend, LayerTokens(tokens, self._layer, self._config)
        self._compressor.store(x, tokens)
        q = backend.index_query(backend.gemm_fp8(q_lora, self._wq_b), at)
        weights, pool = backend.linear(x, self._weights_proj), self._compressor.pool
        scores = backend.mqa_logits(q, weights, pool, at, metadata)
        return backend.top_entries(scores, at)


class Dsv4Attention:
    """One layer's attention as two operations, with an all-reduce at its end."""

    def __init__(self, ctx: RankContext, config: Dsv4Config, layer: int) -> None:
        self._ctx, self._config, self._layer = ctx, config, layer
        hidden, rank, dim = config.hidden_size, config.q_lora_rank, config.head_dim
        lora, per_group = config.o_lora_rank, config.num_attention_heads * dim // config.o_groups
        heads = ctx.attn_shard(config.num_attention_heads)
        groups = ctx.attn_shard(config.o_groups)
        self._wqkv_a = ctx.fp8(layer, "wqkv_a", rank + dim, hidden)
        self._q_norm = ctx.norm(layer, "q_norm", rank)
        self._kv_norm = ctx.norm(layer, "kv_norm", dim)
        self._wq_b = ctx.fp8(layer, "wq_b", heads, dim, rank)
        self._sink = ctx.fp32(layer, "attn_sink", heads, scale=0.5)
        self._wo_a = ctx.fp8(layer, "wo_a", groups, lora, per_group, grouped=True)
        self._wo_b = ctx.fp8(layer, "wo_b", hidden, ctx.attn_shard(config.o_groups * lora))
        ratio = config.compress_ratio(layer)
        self._compressor = Compressor(ctx, config, layer, "compressor", dim) if ratio else None
        self._indexer = Indexer(ctx, config, layer) if ratio == 4 else None

    def prepare(self, state: LayerState) -> None:
        """sublayer_input [T, H] -> q [T, h, D] and selected entries; fills the cache."""
        ctx, backend, config = self._ctx, self._ctx.backend, self._config
        x, batch = state.pop("sublayer_input"), state["batch"]
        tokens = ctx.tokens(batch)
        own = LayerTokens(tokens, self._layer, config)
        q_lora, kv = split_columns(backend.gemm_fp8(x, self._wqkv_a), config.q_lora_rank)
        q_lora = backend.rms_norm(q_lora, self._q_norm, config.rms_norm_eps)
        state["q"] = backend.q_norm_rope(backend.gemm_fp8(q_lora, self._wq_b), own)
        kv = ctx.gather_tokens("kv", kv, batch)
        backend.store_kv(kv, self._kv_norm, own._replace(tokens=batch.tokens))
        if self._compressor:
            self._compressor.store(x, tokens)
        state["selected"] = None
        if self._indexer:
            metadata = state["index_metadata"]
            state["selected"] = self._indexer.select(x, q_lora, tokens, metadata)

    def core(self, state: LayerState) -> None:
        """q -> sublayer_output [T, H]: attention, grouped projection, sum over ranks."""
        ctx, backend, batch = self._ctx, self._ctx.backend, state["batch"]
        own = LayerTokens(ctx.tokens(batch), self._layer, self._config)
        pool = self._compressor.pool if self._compressor else None
        out = backend.attention(state.pop("q"), state.pop("selected"), pool, self._sink, own)
        rows, groups, lora = out.shape[0], self._wo_a.groups, self._wo_a.n
        grouped = backend.einsum_fp8(out.reshape(rows, groups, self._wo_a.k), self._wo_a)
        partial = backend.gemm_fp8(grouped.reshape(rows, groups * lora), self._wo_b, partial=True)
        state["sublayer_output"] = ctx.sum_hidden(
            "attention output", partial, ctx.attn_tp_group, batch
        )


class HyperConnection:
    """Mixes the copies of the residual stream before and after one sub-layer."""

    def __init__(self, ctx: RankContext, config: Dsv4Config, layer: int, name: str) -> None:
        self._backend, self._config = ctx.backend, config
        mixes = config.hc_mult * (2 + config.hc_mult)
        width = config.hc_hidden_size
        self._mix = _mix_weights(ctx, layer, f"{name}_hc", (mixes, width), 3)
        self._norm = ctx.norm(layer, f"{name}_norm", config.hidden_size)

    def pre(self, state: LayerState) -> None:
        """hidden_states [T, M * H] -> sublayer_input [T, H]; stores the stream for ``post``."""
        backend, config = self._backend, self._config
        stream = state.pop("hidden_states")
        gemm = backend.hc_prenorm(stream, self._mix.fn)
        mixed, post, comb = backend.hc_pre(stream, gemm, self._mix, config)
        state["sublayer_input"] = backend.rms_norm(mixed, self._norm, config.rms_norm_eps)
        state["mixing"] = (stream, post, comb)

    def post(self, state: LayerState) -> None:
        """sublayer_output [T, H] -> hidden_states [T, M * H]."""
        output = state.pop("sublayer_output")
        state["hidden_states"] = self._backend.hc_post(output, *state.pop("mixing"))


def _mix_weights(
    ctx: RankContext, layer: int, name: str, shape: tuple[int, int], scales: int
) -> MixWeights:
    return MixWeights(
        ctx.fp32(layer, f"{name}_fn", *shape, scale=0.02),
        ctx.fp32(layer, f"{name}_base", shape[0], scale=0.1),
        ctx.fp32(layer, f"{name}_scale", scales, scale=0.1, mean=1.0),
    )


class Dsv4Layer:
    """One decoder layer as operations on state ``hidden_states`` [T, hc_mult * H]."""

    has_experts = True

    def __init__(self, ctx: RankContext, config: Dsv4Config, layer: int) -> None:
        self._ctx = ctx
        self._attention_hc = HyperConnection(ctx, config, layer, "attn")
        self._attention = Dsv4Attention(ctx, config, layer)
        self._mlp_hc = HyperConnection(ctx, config, layer, "mlp")
        hash_routed = layer < config.num_hash_layers
        self._moe = make_experts(ctx, config, layer, hash_routed=hash_routed)

    def operations(self) -> dict[str, Operation]:
        """The layer's operations by name; a strategy orders them."""
        return {
            "comm_prepare_attn": self._prepare_attention,
            "attn_prepare": self._attention.prepare,
            "attn_core": self._attention.core,
            "comm_prepare_mlp": self._prepare_mlp,
            **self._moe.operations(),
            "comm_postprocess_layer": self._mlp_hc.post,
        }

    def _prepare_attention(self, state: LayerState) -> None:
        self._attention_hc.pre(state)
        own = state.pop("sublayer_input")
        state["sublayer_input"] = self._ctx.gather("attention input", own, state["batch"])

    def _prepare_mlp(self, state: LayerState) -> None:
        self._attention_hc.post(state)
        self._mlp_hc.pre(state)


class Dsv4Decoder:
    """The layers of a stage, and the steps around them that depend on the model family."""

    def __init__(self, ctx: RankContext, config: Dsv4Config, layers: range) -> None:
        self._ctx, self._config = ctx, config
        self.layers = [Dsv4Layer(ctx, config, layer) for layer in layers]
        self._indexed = any(config.compress_ratio(layer) == 4 for layer in layers)
        if ctx.is_last_stage:
            self._head = _mix_weights(
                ctx, -1, "hc_head", (config.hc_mult, config.hc_hidden_size), 1
            )

    def first_state(self, embedded: Tensor) -> dict[str, Tensor]:
        """Tensors before the first layer of the model."""
        return {"hidden_states": self._ctx.backend.repeat(embedded, self._config.hc_mult)}

    def index_metadata(self, batch: ForwardBatch) -> Tensor | None:
        """The indexer's work split, computed once for all layers; None if no layer needs it."""
        scores_without_pages = (
            batch.mode.is_extend
            and batch.batch_size == 1
            and self._ctx.parallel.attn_cp == 1
            and batch.num_tokens >= NONPAGED_MIN_QUERY_TOKENS
        )
        if not self._indexed or scores_without_pages:
            return None
        return self._ctx.backend.paged_mqa_metadata(self._ctx.tokens(batch))

    def collapse(self, tensors: dict[str, Tensor]) -> Tensor:
        """Hidden states [T, H] after the last layer."""
        return self._ctx.backend.hc_head(tensors["hidden_states"], self._head, self._config)
