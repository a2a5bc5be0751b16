"""The DSV4 decoder layer: hyper-connections around attention and around the experts."""

from __future__ import annotations

from typing import Any

from runner.backend.forward_batch import ForwardBatch
from runner.config.model import Dsv4Config
from runner.model.context import RankContext
from runner.model.dsv4_attention import NONPAGED_MIN_QUERY_TOKENS, Dsv4Attention
from runner.model.mhc import HyperConnection, HyperHead
from runner.model.moe import MixtureOfExperts
from runner.model.operations import Operation, OperationState


class Dsv4Layer:
    """One decoder layer as operations on state ``hidden_states`` [T, hc_mult * H]."""

    def __init__(self, ctx: RankContext, config: Dsv4Config, layer: int) -> None:
        self._ctx = ctx
        self._attention_hc = HyperConnection(ctx, config, layer, "attn")
        self._attention = Dsv4Attention(ctx, config, layer)
        self._mlp_hc = HyperConnection(ctx, config, layer, "mlp")
        hash_routed = layer < config.num_hash_layers
        self._moe = MixtureOfExperts(ctx, config, layer, hash_routed=hash_routed)

    has_experts = True

    def operations(self) -> list[Operation]:
        """The layer's operations; a strategy orders them."""
        moe = self._moe
        return [
            Operation("comm_prepare_attn", self._prepare_attention),
            Operation("attn_prepare", self._attention.prepare),
            Operation("attn_core", self._attention.core),
            Operation("comm_prepare_mlp", self._prepare_mlp),
            Operation("gate", moe.gate),
            Operation("select_experts", moe.select_experts),
            Operation("dispatch_a", moe.dispatch_a),
            Operation("dispatch_b", moe.dispatch_b),
            Operation("shared_experts", moe.shared_experts),
            Operation("experts", moe.experts),
            Operation("combine_a", moe.combine_a),
            Operation("combine_b", moe.combine_b),
            Operation("output", moe.output),
            Operation("comm_postprocess_layer", self._mlp_hc.post),
        ]

    def _prepare_attention(self, state: OperationState) -> None:
        self._attention_hc.pre(state)
        every = self._ctx.gather(
            "attention input", state.take("sublayer_input"), state.peek("batch")
        )
        state.put(sublayer_input=every)

    def _prepare_mlp(self, state: OperationState) -> None:
        self._attention_hc.post(state)
        self._mlp_hc.pre(state)


class Dsv4Family:
    """What a pipeline stage needs to know of the DSV4 family."""

    def __init__(self, ctx: RankContext, config: Dsv4Config, layers: range) -> None:
        self._ctx, self._config = ctx, config
        self.layers = [Dsv4Layer(ctx, config, layer) for layer in layers]
        self._indexed = any(config.compress_ratio(layer) == 4 for layer in layers)

    shared = ("index_metadata",)
    """Names of :meth:`batch_state`."""

    def first_state(self, embedded: Any) -> dict[str, Any]:
        """State before the first layer of the model."""
        return {"hidden_states": self._ctx.backend.repeat(embedded, self._config.hc_mult)}

    def batch_state(self, batch: ForwardBatch) -> dict[str, Any]:
        """State that all layers of a forward share: the indexer's work split, made once."""
        if not self._indexed or _scores_without_pages(self._ctx, batch):
            return {"index_metadata": None}
        tokens = self._ctx.tokens(batch)
        return {"index_metadata": self._ctx.backend.paged_mqa_metadata(tokens)}

    def make_head(self) -> HyperHead:
        """What stands between the last layer and the final norm."""
        return HyperHead(self._ctx, self._config)

    def collapse(self, head: HyperHead, state: dict[str, Any]) -> Any:
        """Hidden states [T, H] after the last layer."""
        return head(state["hidden_states"])


def _scores_without_pages(ctx: RankContext, batch: ForwardBatch) -> bool:
    return (
        batch.mode.is_extend
        and batch.batch_size == 1
        and ctx.parallel.attn_cp == 1
        and batch.num_tokens >= NONPAGED_MIN_QUERY_TOKENS
    )
