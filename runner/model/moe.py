"""Gate, expert selection, routed and shared experts: the operations of both model families.

Without expert parallelism each rank holds a slice of every expert, with it whole experts of its
own. How tokens come to them is :mod:`runner.model.dispatch`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from runner.backend.weights import WeightRequest
from runner.config.model import ModelConfig
from runner.model.context import RankContext
from runner.model.dispatch import make_dispatcher
from runner.model.mlp import GatedMlp
from runner.model.operations import OperationState


class MixtureOfExperts:
    """One layer's mixture of experts, as operations."""

    def __init__(
        self, ctx: RankContext, model: ModelConfig, layer: int, *, hash_routed: bool
    ) -> None:
        self._ctx, self._moe = ctx, model.moe
        moe, hidden = model.moe, model.hidden_size
        self._gate = ctx.replicated(
            layer, "gate", "bf16", moe.n_routed_experts, hidden, scale=hidden**-0.5
        )
        self._hash_routed = hash_routed
        if hash_routed:
            self._choice = ctx.make(_hash_table(layer, model))
        else:
            self._choice = ctx.replicated(
                layer, "gate_bias", "fp32", moe.n_routed_experts, scale=0.1
            )
        everything = (0, moe.n_routed_experts)
        self._experts = ctx.tp_shard(moe.n_routed_experts) if ctx.parallel.ep else everything
        self._w13, self._w2 = self._expert_weights(layer, hidden)
        shared = moe.n_shared_experts * moe.moe_intermediate_size
        self._shared = GatedMlp(
            ctx, layer, "shared", hidden, shared, moe.swiglu_limit, sharded=not ctx.scatters
        )
        inner = self._intermediate
        self._dispatcher = make_dispatcher(ctx, moe, self._experts, inner[1] - inner[0])

    @property
    def _intermediate(self) -> tuple[int, int]:
        size = self._moe.moe_intermediate_size
        return (0, size) if self._ctx.parallel.ep else self._ctx.tp_shard(size)

    def _expert_weights(self, layer: int, hidden: int) -> tuple[Any, Any]:
        first, last = self._experts
        inner = self._intermediate
        width = inner[1] - inner[0]
        experts, full = self._moe.n_routed_experts, self._moe.moe_intermediate_size
        w13 = WeightRequest(
            layer,
            "experts_w13",
            "fp8",
            (experts, 2, full, hidden),
            ((first, last), (0, 2), inner, (0, hidden)),
            (last - first, 2 * width, hidden),
            scale=hidden**-0.5,
        )
        w2 = WeightRequest(
            layer,
            "experts_w2",
            "fp8",
            (experts, hidden, full),
            ((first, last), (0, hidden), inner),
            (last - first, hidden, width),
            scale=full**-0.5,
        )
        return self._ctx.make(w13), self._ctx.make(w2)

    def gate(self, state: OperationState) -> None:
        """sublayer_input [T, H] -> router_logits [T, experts] fp32."""
        hidden = self._ctx.gather_tokens(
            "moe tokens", state.take("sublayer_input"), state.peek("batch")
        )
        logits = self._ctx.backend.gemm_bf16_fp32(hidden, self._gate)
        state.put(moe_input=hidden, router_logits=logits)

    def select_experts(self, state: OperationState) -> None:
        """router_logits -> routing."""
        backend, logits = self._ctx.backend, state.take("router_logits")
        if self._hash_routed:
            tokens = self._dispatcher.tokens(state.peek("batch"))
            routing = backend.hash_top_k(logits, self._choice, tokens, self._moe)
        else:
            routing = backend.top_k(logits, self._choice, self._moe)
        state.put(routing=routing)

    def dispatch_a(self, state: OperationState) -> None:
        """Start to bring tokens to their experts."""
        self._dispatcher.dispatch_a(state)

    def dispatch_b(self, state: OperationState) -> None:
        """Wait until the tokens are there."""
        self._dispatcher.dispatch_b(state)

    def shared_experts(self, state: OperationState) -> None:
        """moe_input -> shared_output, a partial sum unless this rank has a block of the tokens."""
        state.put(shared_output=self._shared(state.peek("moe_input")))

    def experts(self, state: OperationState) -> None:
        """Two grouped GEMMs with the activation between."""
        backend, dispatched = self._ctx.backend, state.peek("dispatched")
        inner = backend.silu_and_mul(
            backend.experts_gemm(dispatched, self._w13), self._moe.swiglu_limit
        )
        narrow = replace(dispatched, x=inner)
        expert_output = backend.experts_gemm(narrow, self._w2, partial=True)
        state.put(expert_output=expert_output)

    def combine_a(self, state: OperationState) -> None:
        """Start to bring expert outputs back to their tokens."""
        self._dispatcher.combine_a(state)

    def combine_b(self, state: OperationState) -> None:
        """Wait until the outputs are back."""
        self._dispatcher.combine_b(state)

    def output(self, state: OperationState) -> None:
        """Sum of routed and shared outputs -> sublayer_output [T, H]."""
        state.take("moe_input")
        total = self._ctx.backend.add(state.take("routed_output"), state.take("shared_output"))
        self._dispatcher.output(state, total)


def _hash_table(layer: int, model: ModelConfig) -> WeightRequest:
    moe = model.moe
    shape = (model.vocab_size, moe.num_experts_per_tok)
    slices = tuple((0, size) for size in shape)
    return WeightRequest(layer, "tid2eid", "ids", shape, slices, shape, high=moe.n_routed_experts)
