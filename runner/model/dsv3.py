"""The DSV3 decoder layer: multi-head latent attention, a dense MLP or experts, one residual."""

from __future__ import annotations

from typing import Any

from runner.backend.forward_batch import ForwardBatch
from runner.backend.math import Tokens
from runner.backend.weights import WeightRequest
from runner.config.model import Dsv3Config
from runner.model.context import RankContext
from runner.model.mlp import GatedMlp
from runner.model.moe import MixtureOfExperts
from runner.model.operations import Operation, OperationState


class MlaAttention:
    """Latent attention: EXTEND expands the latent into heads, DECODE absorbs the projection."""

    def __init__(self, ctx: RankContext, config: Dsv3Config, layer: int) -> None:
        self._ctx, self._config, self._layer = ctx, config, layer
        hidden, rank = config.hidden_size, config.q_lora_rank
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        head = config.qk_nope_head_dim + config.qk_rope_head_dim
        self._qkv_a = ctx.replicated(
            layer, "fused_qkv_a", "fp8", rank + latent, hidden, scale=hidden**-0.5
        )
        self._q_norm = ctx.replicated(layer, "q_norm", "bf16", rank, scale=0.1, mean=1.0)
        self._kv_norm = ctx.replicated(
            layer, "kv_norm", "bf16", config.kv_lora_rank, scale=0.1, mean=1.0
        )
        self._q_b = self._heads_weight("q_b_proj", head, rank)
        self._kv_b = self._heads_weight(
            "kv_b_proj", config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank
        )
        self._w_kc, self._w_vc = ctx.backend.math.mla_absorbed(self._kv_b, config)
        first, last = ctx.attn_shard(config.num_attention_heads * config.v_head_dim)
        inner = config.num_attention_heads * config.v_head_dim
        self._o = ctx.make(
            WeightRequest(
                layer,
                "o_proj",
                "fp8",
                (hidden, inner),
                ((0, hidden), (first, last)),
                (hidden, last - first),
                scale=inner**-0.5,
            )
        )

    def _heads_weight(self, name: str, per_head: int, k: int) -> Any:
        heads = self._config.num_attention_heads
        first, last = self._ctx.attn_shard(heads)
        return self._ctx.make(
            WeightRequest(
                self._layer,
                name,
                "fp8",
                (heads, per_head, k),
                ((first, last), (0, per_head), (0, k)),
                ((last - first) * per_head, k),
                scale=k**-0.5,
            )
        )

    def prepare(self, state: OperationState) -> None:
        """sublayer_input [T, H] -> q [T, h * (nope + rope)] and the normed latent."""
        backend, config = self._ctx.backend, self._config
        x, batch = state.take("sublayer_input"), state.peek("batch")
        latent_width = config.kv_lora_rank + config.qk_rope_head_dim
        q_lora, latent = backend.columns(
            backend.gemm_fp8(x, self._qkv_a), config.q_lora_rank, latent_width
        )
        q_lora = backend.rms_norm(q_lora, self._q_norm, config.rms_norm_eps)
        q = backend.gemm_fp8(q_lora, self._q_b)
        everyone = Tokens(batch, 0, batch.num_tokens)
        latent = self._ctx.gather_tokens("latent", latent, batch)
        latent = backend.mla_store(latent, self._kv_norm, everyone, self._layer, config)
        state.put(q=q, latent=latent)

    def core(self, state: OperationState) -> None:
        """q -> sublayer_output [T, H]."""
        ctx, backend = self._ctx, self._ctx.backend
        batch = state.peek("batch")
        tokens, q, latent = ctx.tokens(batch), state.take("q"), state.take("latent")
        if batch.mode.is_extend:
            kv = backend.gemm_fp8(latent, self._kv_b)
            out = backend.mla_extend(q, kv, tokens, self._layer, self._config)
        else:
            out = backend.mla_decode(q, self._w_kc, self._w_vc, tokens, self._layer, self._config)
        partial = backend.gemm_fp8(out, self._o, partial=True)
        output = ctx.sum_hidden("attention output", partial, ctx.attn_tp_group, batch)
        state.put(sublayer_output=output)


class Dsv3Layer:
    """One decoder layer as operations on state ``hidden_states`` and ``residual``, [T, H] each."""

    def __init__(self, ctx: RankContext, config: Dsv3Config, layer: int) -> None:
        self._ctx, self._config = ctx, config
        width = config.hidden_size
        self._attn_norm = ctx.replicated(layer, "attn_norm", "bf16", width, scale=0.1, mean=1.0)
        self._mlp_norm = ctx.replicated(layer, "mlp_norm", "bf16", width, scale=0.1, mean=1.0)
        self._attention = MlaAttention(ctx, config, layer)
        self._mlp: GatedMlp | None = None
        self._moe: MixtureOfExperts | None = None
        if config.is_dense(layer):
            self._mlp = GatedMlp(ctx, layer, "mlp", width, config.intermediate_size, 0.0)
        else:
            self._moe = MixtureOfExperts(ctx, config, layer, hash_routed=False)

    @property
    def has_experts(self) -> bool:
        """Whether a strategy can order its operations."""
        return self._moe is not None

    def operations(self) -> list[Operation]:
        """The layer's operations; a strategy orders those of a layer with experts."""
        attention = [
            Operation("comm_prepare_attn", self._prepare_attention),
            Operation("attn_prepare", self._attention.prepare),
            Operation("attn_core", self._attention.core),
            Operation("comm_prepare_mlp", self._prepare_mlp),
        ]
        finish = Operation("comm_postprocess_layer", self._finish)
        if self._moe is None:
            return [*attention, Operation("mlp", self._dense), finish]
        moe = self._moe
        return [
            *attention,
            Operation("gate", moe.gate),
            Operation("select_experts", moe.select_experts),
            Operation("dispatch_a", moe.dispatch_a),
            Operation("dispatch_b", moe.dispatch_b),
            Operation("shared_experts", moe.shared_experts),
            Operation("experts", moe.experts),
            Operation("combine_a", moe.combine_a),
            Operation("combine_b", moe.combine_b),
            Operation("output", moe.output),
            finish,
        ]

    def _prepare_attention(self, state: OperationState) -> None:
        hidden, residual = state.take("hidden_states"), state.take("residual")
        stream = hidden if residual is None else self._ctx.backend.add(hidden, residual)
        self._put_normed(state, stream, self._attn_norm)
        every = self._ctx.gather(
            "attention input", state.take("sublayer_input"), state.peek("batch")
        )
        state.put(sublayer_input=every)

    def _prepare_mlp(self, state: OperationState) -> None:
        stream = self._ctx.backend.add(state.take("sublayer_output"), state.take("residual"))
        self._put_normed(state, stream, self._mlp_norm)

    def _put_normed(self, state: OperationState, stream: Any, norm: Any) -> None:
        normed = self._ctx.backend.rms_norm(stream, norm, self._config.rms_norm_eps)
        state.put(sublayer_input=normed, residual=stream)

    def _dense(self, state: OperationState) -> None:
        ctx, batch = self._ctx, state.peek("batch")
        assert self._mlp is not None
        hidden = ctx.gather_tokens("mlp tokens", state.take("sublayer_input"), batch)
        hidden = ctx.gather("mlp tokens", hidden, batch)
        total = ctx.sum_hidden("mlp output", self._mlp(hidden), ctx.tp_group, batch)
        if ctx.splits_tokens(batch):
            own = ctx.tokens(batch)
            total = ctx.backend.rows(total, own.start, own.stop)
        state.put(sublayer_output=total)

    def _finish(self, state: OperationState) -> None:
        state.put(hidden_states=state.take("sublayer_output"))


class Dsv3Family:
    """What a pipeline stage needs to know of the DSV3 family."""

    def __init__(self, ctx: RankContext, config: Dsv3Config, layers: range) -> None:
        self._ctx = ctx
        self.layers = [Dsv3Layer(ctx, config, layer) for layer in layers]

    shared = ()
    """Names of :meth:`batch_state`."""

    def first_state(self, embedded: Any) -> dict[str, Any]:
        """State before the first layer of the model."""
        return {"hidden_states": embedded, "residual": None}

    def batch_state(self, batch: ForwardBatch) -> dict[str, Any]:
        """Nothing is shared between layers."""
        return {}

    def make_head(self) -> None:
        """Nothing stands between the last layer and the final norm."""

    def collapse(self, head: None, state: dict[str, Any]) -> Any:
        """Hidden states [T, H] after the last layer."""
        return self._ctx.backend.add(state["hidden_states"], state["residual"])
