"""The DSV3 decoder: multi-head latent attention, dense MLPs or experts, and one residual stream."""

from __future__ import annotations

from runner.backend.forward_batch import ForwardBatch, LayerTokens
from runner.backend.tensor import Tensor, split_columns
from runner.config.model import Dsv3Config
from runner.model.context import RankContext
from runner.model.moe import GatedMlp, make_experts
from runner.model.operations import LayerState, Operation


class MlaAttention:
    """Latent attention: EXTEND expands the latent into heads, DECODE absorbs the projection."""

    def __init__(self, ctx: RankContext, config: Dsv3Config, layer: int) -> None:
        self._ctx, self._config, self._layer = ctx, config, layer
        hidden, rank, latent = config.hidden_size, config.q_lora_rank, config.kv_lora_rank
        nope, rope, v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        heads = ctx.attn_shard(config.num_attention_heads)
        self._qkv_a = ctx.fp8(layer, "fused_qkv_a", rank + latent + rope, hidden)
        self._q_norm = ctx.norm(layer, "q_norm", rank)
        self._kv_norm = ctx.norm(layer, "kv_norm", latent)
        self._q_b = ctx.fp8(layer, "q_b_proj", heads, nope + rope, rank)
        self._kv_b = ctx.fp8(layer, "kv_b_proj", heads, nope + v_dim, latent)
        self._absorbed = ctx.backend.mla_absorbed(self._kv_b, config)
        inner = ctx.attn_shard(config.num_attention_heads * v_dim)
        self._o = ctx.fp8(layer, "o_proj", hidden, inner)

    def prepare(self, state: LayerState) -> None:
        """sublayer_input [T, H] -> q [T, h * (nope + rope)] and the normed latent."""
        backend, config = self._ctx.backend, self._config
        batch = state["batch"]
        both = backend.gemm_fp8(state.pop("sublayer_input"), self._qkv_a)
        q_lora, latent = split_columns(both, config.q_lora_rank)
        q_lora = backend.rms_norm(q_lora, self._q_norm, config.rms_norm_eps)
        state["q"] = backend.gemm_fp8(q_lora, self._q_b)
        latent = self._ctx.gather_tokens("latent", latent, batch)
        everyone = LayerTokens(batch.tokens, self._layer, config)
        state["latent"] = backend.mla_store(latent, self._kv_norm, everyone)

    def core(self, state: LayerState) -> None:
        """q -> sublayer_output [T, H]."""
        ctx, backend = self._ctx, self._ctx.backend
        batch = state["batch"]
        own = LayerTokens(ctx.tokens(batch), self._layer, self._config)
        q, latent = state.pop("q"), state.pop("latent")
        if batch.mode.is_extend:
            kv = backend.gemm_fp8(latent, self._kv_b)
            out = backend.mla_extend(q, kv, own)
        else:
            out = backend.mla_decode(q, self._absorbed, own)
        partial = backend.gemm_fp8(out, self._o, partial=True)
        state["sublayer_output"] = ctx.sum_hidden(
            "attention output", partial, ctx.attn_tp_group, batch
        )


class Dsv3Layer:
    """One decoder layer as operations on state ``hidden_states`` and ``residual``, [T, H] each."""

    def __init__(self, ctx: RankContext, config: Dsv3Config, layer: int) -> None:
        self._ctx, self._config = ctx, config
        width = config.hidden_size
        self._attn_norm = ctx.norm(layer, "attn_norm", width)
        self._mlp_norm = ctx.norm(layer, "mlp_norm", width)
        self._attention = MlaAttention(ctx, config, layer)
        self.has_experts = not config.is_dense(layer)
        if self.has_experts:
            self._feed_forward = make_experts(ctx, config, layer).operations()
        else:
            self._mlp = GatedMlp(ctx, layer, "mlp", width, config.intermediate_size, 0.0)
            self._feed_forward = {"mlp": self._dense}

    def operations(self) -> dict[str, Operation]:
        """The layer's operations by name; a strategy orders them if the layer has experts."""
        return {
            "comm_prepare_attn": self._prepare_attention,
            "attn_prepare": self._attention.prepare,
            "attn_core": self._attention.core,
            "comm_prepare_mlp": self._prepare_mlp,
            **self._feed_forward,
            "comm_postprocess_layer": self._finish,
        }

    def _prepare_attention(self, state: LayerState) -> None:
        ctx, stream = self._ctx, state.pop("hidden_states")
        if "residual" in state:
            stream = ctx.backend.add(stream, state.pop("residual"))
        state["residual"] = stream
        normed = ctx.backend.rms_norm(stream, self._attn_norm, self._config.rms_norm_eps)
        state["sublayer_input"] = ctx.gather("attention input", normed, state["batch"])

    def _prepare_mlp(self, state: LayerState) -> None:
        backend = self._ctx.backend
        stream = backend.add(state.pop("sublayer_output"), state.pop("residual"))
        state["residual"] = stream
        state["sublayer_input"] = backend.rms_norm(
            stream, self._mlp_norm, self._config.rms_norm_eps
        )

    def _dense(self, state: LayerState) -> None:
        ctx, batch = self._ctx, state["batch"]
        hidden = ctx.gather_tokens("mlp tokens", state.pop("sublayer_input"), batch)
        hidden = ctx.gather("mlp tokens", hidden, batch)
        total = ctx.sum_hidden("mlp output", self._mlp(hidden), ctx.tp_group, batch)
        state["sublayer_output"] = ctx.own_rows(total, batch)

    def _finish(self, state: LayerState) -> None:
        state["hidden_states"] = state.pop("sublayer_output")


class Dsv3Decoder:
    """The layers of a stage, and the steps around them that depend on the model family."""

    def __init__(self, ctx: RankContext, config: Dsv3Config, layers: range) -> None:
        self._ctx = ctx
        self.layers = [Dsv3Layer(ctx, config, layer) for layer in layers]

    def first_state(self, embedded: Tensor) -> dict[str, Tensor]:
        """Tensors before the first layer of the model."""
        return {"hidden_states": embedded}

    def index_metadata(self, batch: ForwardBatch) -> None:
        """None: DSV3 has no indexer."""

    def collapse(self, tensors: dict[str, Tensor]) -> Tensor:
        """Hidden states [T, H] after the last layer."""
        return self._ctx.backend.add(tensors["hidden_states"], tensors["residual"])
