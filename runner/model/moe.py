"""Gated MLPs and the mixture of experts: the operations of both model families.

With expert parallelism each rank holds some whole experts; without it, a slice of every expert.
If tokens are replicated, each rank runs its experts on the tokens that chose them, and an
all-reduce sums the results. If tokens are scattered (``moe_a2a``), each rank has a block of them.
With expert parallelism, an all-to-all sends tokens to their experts' ranks and another one returns
the results; without it, all-gather and reduce-scatter do.
"""

from __future__ import annotations

from dataclasses import replace

from runner.backend.communication import Begun
from runner.backend.forward_batch import ForwardBatch, Tokens
from runner.backend.tensor import Dispatched, Routing, Tensor
from runner.backend.weights import Shard
from runner.config.model import ModelConfig
from runner.model.context import RankContext
from runner.model.operations import LayerState, Operation


class GatedMlp:
    """``down(silu(gate(x)) * up(x))`` on FP8 GEMMs, for shared experts and dense layers.

    If ``sharded``, tensor-parallel ranks each hold a part and compute a partial sum.
    """

    def __init__(
        self,
        ctx: RankContext,
        layer: int,
        name: str,
        hidden: int,
        intermediate: int,
        limit: float,
        *,
        sharded: bool = True,
    ) -> None:
        self._backend, self._limit = ctx.backend, limit
        inner = ctx.tp_shard(intermediate) if sharded else intermediate
        self._gate_up = ctx.fp8(layer, f"{name}_gate_up", 2, inner, hidden)
        self._down = ctx.fp8(layer, f"{name}_down", hidden, inner)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]; this rank's part of the sum if sharded."""
        gate_up = self._backend.gemm_fp8(x, self._gate_up)
        activated = self._backend.silu_and_mul(gate_up, self._limit)
        return self._backend.gemm_fp8(activated, self._down, partial=True)


class MixtureOfExperts:
    """One layer's mixture of experts when every rank has all tokens, so that dispatch is local."""

    def __init__(
        self, ctx: RankContext, model: ModelConfig, layer: int, *, hash_routed: bool = False
    ) -> None:
        self._ctx, self._moe, self._hash_routed = ctx, model.moe, hash_routed
        moe, hidden, total = model.moe, model.hidden_size, model.moe.n_routed_experts
        self._gate = ctx.bf16(layer, "gate", total, hidden)
        if hash_routed:
            table = (model.vocab_size, moe.num_experts_per_tok)
            self._choice = ctx.ids(layer, "tid2eid", *table, high=total)
        else:
            self._choice = ctx.fp32(layer, "gate_bias", total, scale=0.1)
        width = moe.moe_intermediate_size
        if ctx.parallel.ep:
            experts, inner = ctx.tp_shard(total), Shard(width, 0, width)
        else:
            experts, inner = Shard(total, 0, total), ctx.tp_shard(width)
        self._experts, self._intermediate = (experts.start, experts.stop), inner.width
        self._w13 = ctx.fp8(layer, "experts_w13", experts, 2, inner, hidden, grouped=True)
        self._w2 = ctx.fp8(layer, "experts_w2", experts, hidden, inner, grouped=True)
        shared = moe.n_shared_experts * width
        self._shared = GatedMlp(
            ctx, layer, "shared", hidden, shared, moe.swiglu_limit, sharded=not ctx.scatters
        )

    def operations(self) -> dict[str, Operation]:
        """The operations of the experts by name, in the default order."""
        return {
            "gate": self.gate,
            "select_experts": self.select_experts,
            "dispatch_a": self.dispatch_a,
            "dispatch_b": self.dispatch_b,
            "shared_experts": self.shared_experts,
            "experts": self.experts,
            "combine_a": self.combine_a,
            "combine_b": self.combine_b,
            "output": self.output,
        }

    def gate(self, state: LayerState) -> None:
        """sublayer_input [T, H] -> router_logits [T, experts] fp32."""
        hidden = self._ctx.gather_tokens("moe tokens", state.pop("sublayer_input"), state["batch"])
        state["moe_input"] = hidden
        state["router_logits"] = self._ctx.backend.gemm_bf16_fp32(hidden, self._gate)

    def select_experts(self, state: LayerState) -> None:
        """router_logits -> routing."""
        backend, logits = self._ctx.backend, state.pop("router_logits")
        if self._hash_routed:
            tokens = self.routed_tokens(state["batch"])
            state["routing"] = backend.hash_top_k(logits, self._choice, tokens, self._moe)
        else:
            state["routing"] = backend.top_k(logits, self._choice, self._moe)

    def shared_experts(self, state: LayerState) -> None:
        """moe_input -> shared_output; a partial sum, or the full one if tokens are scattered."""
        state["shared_output"] = self._shared(state["moe_input"])

    def experts(self, state: LayerState) -> None:
        """dispatched -> expert_output: two grouped GEMMs with the activation between."""
        backend, dispatched = self._ctx.backend, state["dispatched"]
        inner = backend.experts_gemm(dispatched, self._w13)
        narrow = replace(dispatched, x=backend.silu_and_mul(inner, self._moe.swiglu_limit))
        state["expert_output"] = backend.experts_gemm(narrow, self._w2, partial=True)

    def routed_tokens(self, batch: ForwardBatch) -> Tokens:
        """The tokens that this rank selects experts for."""
        return batch.tokens

    def dispatch_a(self, state: LayerState) -> None:
        """moe_input, routing -> dispatched; if tokens are scattered, only start to send them."""
        state["dispatched"] = self._lay_out(state["moe_input"], state["routing"], state["batch"])

    def dispatch_b(self, state: LayerState) -> None:
        """If tokens are scattered, wait for them: -> dispatched."""

    def combine_a(self, state: LayerState) -> None:
        """expert_output -> routed_output; if tokens are scattered, only start to send results."""
        state["routed_output"] = self._combine(state)

    def combine_b(self, state: LayerState) -> None:
        """If tokens are scattered, wait for their results: -> routed_output."""

    def output(self, state: LayerState) -> None:
        """routed_output + shared_output -> sublayer_output [T, H], summed over ranks."""
        ctx, batch = self._ctx, state["batch"]
        total = ctx.sum_hidden("moe output", self._add_outputs(state), ctx.tp_group, batch)
        state["sublayer_output"] = ctx.own_rows(total, batch)

    def _lay_out(self, x: Tensor, routing: Routing, batch: ForwardBatch) -> Dispatched:
        decode = not batch.mode.is_extend
        return self._ctx.backend.dispatch(
            x, routing, self._experts, self._moe, self._intermediate, decode=decode
        )

    def _combine(self, state: LayerState) -> Tensor:
        return self._ctx.backend.combine_expert_outputs(
            state.pop("expert_output"),
            state.pop("dispatched"),
            state.pop("routing"),
            self._moe.routed_scaling_factor,
        )

    def _add_outputs(self, state: LayerState) -> Tensor:
        state.pop("moe_input")
        return self._ctx.backend.add(state.pop("routed_output"), state.pop("shared_output"))


class ScatteredExperts(MixtureOfExperts):
    """One layer's mixture of experts when each rank has a block of the tokens (``moe_a2a``)."""

    def routed_tokens(self, batch: ForwardBatch) -> Tokens:
        return self._ctx.block_tokens(batch)

    def dispatch_a(self, state: LayerState) -> None:
        """Send tokens to their experts' ranks, or to all ranks, along with their routing."""
        ctx, backend = self._ctx, self._ctx.backend
        x, routing = state["moe_input"], state.pop("routing")
        own = self.routed_tokens(state["batch"])
        real = max(0, min(own.stop, own.batch.num_tokens) - own.start)
        packed = backend.pack_routing(routing, real)
        if ctx.parallel.ep:
            per_rank = self._moe.n_routed_experts // ctx.parallel.tp
            x = backend.block_for_each(x, routing, ctx.parallel.tp, per_rank)
        kind = "all_to_all" if ctx.parallel.ep else "all_gather"
        state["tokens_under_way"] = self._begin(state, kind, "tokens", x)
        state["routing_under_way"] = self._begin(state, "all_gather", "routing", packed, width=4)

    def dispatch_b(self, state: LayerState) -> None:
        backend = self._ctx.backend
        x = backend.finish(state.pop("tokens_under_way"))
        routing = backend.unpack_routing(backend.finish(state.pop("routing_under_way")))
        state["routing"] = routing
        state["dispatched"] = self._lay_out(x, routing, state["batch"])

    def combine_a(self, state: LayerState) -> None:
        kind = "all_to_all" if self._ctx.parallel.ep else "reduce_scatter"
        state["results_under_way"] = self._begin(state, kind, "results", self._combine(state))

    def combine_b(self, state: LayerState) -> None:
        backend = self._ctx.backend
        results = backend.finish(state.pop("results_under_way"))
        if self._ctx.parallel.ep:
            results = backend.sum_blocks(results, self._ctx.parallel.tp)
        state["routed_output"] = results

    def output(self, state: LayerState) -> None:
        """routed_output + shared_output -> sublayer_output; no sum over ranks is needed."""
        state["sublayer_output"] = self._add_outputs(state).bfloat16()

    def _begin(
        self, state: LayerState, kind: str, what: str, x: Tensor, *, width: int = 2
    ) -> Begun:
        # Both halves of a batch may have such a collective in flight, so names must differ.
        name = f"{what} of {state['half']}"
        return self._ctx.backend.begin(kind, name, x, self._ctx.tp_group, width=width)


def make_experts(
    ctx: RankContext, model: ModelConfig, layer: int, *, hash_routed: bool = False
) -> MixtureOfExperts:
    """A layer's mixture of experts, for replicated or scattered tokens as the layout requires."""
    kind = ScatteredExperts if ctx.scatters else MixtureOfExperts
    return kind(ctx, model, layer, hash_routed=hash_routed)
