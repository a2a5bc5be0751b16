"""The DSV4 decoder: hyper-connections around attention and around the experts.

Manifold-constrained hyper-connections keep several copies of the residual stream, mixed per token.
Before a sub-layer one GEMM (``TF32_HC_PRENORM_GEMM``) of the flattened stream with a
[hc_mult * (2 + hc_mult), hc_mult * hidden] matrix gives mixing weights; after it the stream is
rebuilt. Formulas: docs/models.md.
"""

from __future__ import annotations

from runner.backend.forward_batch import ForwardBatch
from runner.backend.tensor import Tensor
from runner.config.model import Dsv4Config
from runner.model.context import RankContext
from runner.model.dsv4_attention import NONPAGED_MIN_QUERY_TOKENS, Dsv4Attention
from runner.model.moe import make_experts
from runner.model.operations import LayerState, Operation


class HyperConnection:
    """The mixing around one sub-layer of one layer."""

    def __init__(self, ctx: RankContext, config: Dsv4Config, layer: int, name: str) -> None:
        self._backend, self._config = ctx.backend, config
        mixes = config.hc_mult * (2 + config.hc_mult)
        width = config.hc_hidden_size
        self._fn = ctx.fp32(layer, f"{name}_hc_fn", mixes, width, scale=0.02)
        self._base = ctx.fp32(layer, f"{name}_hc_base", mixes, scale=0.1)
        self._scale = ctx.fp32(layer, f"{name}_hc_scale", 3, scale=0.1, mean=1.0)
        self._norm = ctx.norm(layer, f"{name}_norm", config.hidden_size)

    def pre(self, state: LayerState) -> None:
        """hidden_states [T, M * H] -> sublayer_input [T, H]; keeps the stream and its mixing."""
        backend, config = self._backend, self._config
        stream = state.pop("hidden_states")
        gemm = backend.hc_prenorm(stream, self._fn)
        mixed, post, comb = backend.hc_pre(stream, gemm, self._base, self._scale, config)
        state["sublayer_input"] = backend.rms_norm(mixed, self._norm, config.rms_norm_eps)
        state["mixing"] = (stream, post, comb)

    def post(self, state: LayerState) -> None:
        """sublayer_output [T, H] -> hidden_states [T, M * H]."""
        output = state.pop("sublayer_output")
        state["hidden_states"] = self._backend.hc_post(output, *state.pop("mixing"))


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
    """The layers of a stage, and what differs between families around them."""

    def __init__(self, ctx: RankContext, config: Dsv4Config, layers: range) -> None:
        self._ctx, self._config = ctx, config
        self.layers = [Dsv4Layer(ctx, config, layer) for layer in layers]
        self._indexed = any(config.compress_ratio(layer) == 4 for layer in layers)
        if ctx.is_last_stage:
            copies = config.hc_mult
            self._head = (
                ctx.fp32(-1, "hc_head_fn", copies, config.hc_hidden_size, scale=0.02),
                ctx.fp32(-1, "hc_head_base", copies, scale=0.1),
                ctx.fp32(-1, "hc_head_scale", 1, scale=0.1, mean=1.0),
            )

    def first_state(self, embedded: Tensor) -> dict[str, Tensor]:
        """Tensors before the first layer of the model."""
        return {"hidden_states": self._ctx.backend.repeat(embedded, self._config.hc_mult)}

    def index_metadata(self, batch: ForwardBatch) -> Tensor | None:
        """The indexer's work split, made once for all layers; None where no layer needs it."""
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
        return self._ctx.backend.hc_head(tensors["hidden_states"], *self._head, self._config)
