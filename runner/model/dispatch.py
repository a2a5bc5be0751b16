"""How tokens come to their experts and results back, of ranks that have all tokens or a block.

With replicated tokens each rank's experts take what is theirs and one all-reduce sums the results.
With scattered ones (``moe_a2a``) a rank has a block of the tokens: with expert parallelism an
all-to-all brings each expert's owner its tokens, without it a gather brings every rank all of them,
since each has a slice of every expert; the results go back by all-to-all or by a scatter that sums.
Both go on beside what is between their two operations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from runner.backend.communication import Begun
from runner.backend.forward_batch import ForwardBatch
from runner.backend.math import Dispatched, Routing, Tokens
from runner.config.model import MoeConfig
from runner.model.context import RankContext
from runner.model.operations import OperationState


class Dispatcher(Protocol):
    """The communication around the experts of one layer."""

    def tokens(self, batch: ForwardBatch) -> Tokens:
        """What this rank selects experts for."""

    def dispatch_a(self, state: OperationState) -> None:
        """moe_input and routing: start to bring tokens to their experts."""

    def dispatch_b(self, state: OperationState) -> None:
        """Wait for them and lay them out: dispatched."""

    def combine_a(self, state: OperationState) -> None:
        """expert_output and dispatched: start to bring results back."""

    def combine_b(self, state: OperationState) -> None:
        """Wait for them: routed_output."""

    def output(self, state: OperationState, total: Any) -> None:
        """Routed and shared experts' sum, this rank's part: sublayer_output."""


class _Layout:
    """Rows for the grouped GEMMs of the local experts, and back."""

    def __init__(
        self, ctx: RankContext, moe: MoeConfig, experts: tuple[int, int], intermediate: int
    ) -> None:
        self.ctx, self.moe = ctx, moe
        self._experts, self._intermediate = experts, intermediate

    def lay_out(self, x: Any, routing: Routing, state: OperationState) -> Dispatched:
        decode = not state.peek("batch").mode.is_extend
        return self.ctx.backend.dispatch(
            x, routing, self._experts, self.moe, self._intermediate, decode=decode
        )

    def weigh(self, state: OperationState) -> Any:
        return self.ctx.backend.combine(
            state.take("expert_output"),
            state.take("dispatched"),
            state.take("routing"),
            self.moe.routed_scaling_factor,
        )


class ReplicatedTokens(_Layout):
    """Every rank has all tokens: there is nothing to wait for."""

    def tokens(self, batch: ForwardBatch) -> Tokens:
        """All of them."""
        return replace(self.ctx.tokens(batch), start=0, stop=batch.num_tokens)

    def dispatch_a(self, state: OperationState) -> None:
        """Lay the tokens out."""
        dispatched = self.lay_out(state.peek("moe_input"), state.peek("routing"), state)
        state.put(dispatched=dispatched)

    def dispatch_b(self, state: OperationState) -> None:
        """They are there."""
        state.peek("dispatched")

    def combine_a(self, state: OperationState) -> None:
        """Each token's results, of this rank's experts."""
        state.put(routed_output=self.weigh(state))

    def combine_b(self, state: OperationState) -> None:
        """They are there."""
        state.peek("routed_output")

    def output(self, state: OperationState, total: Any) -> None:
        """Sum over all ranks."""
        ctx, batch = self.ctx, state.peek("batch")
        total = ctx.backend.sum_hidden("moe output", total, ctx.tp_group)
        if ctx.splits_tokens(batch):
            own = ctx.tokens(batch)
            total = ctx.backend.rows(total, own.start, own.stop)
        state.put(sublayer_output=total)


class ScatteredTokens(_Layout):
    """Every rank has a block of the tokens."""

    def tokens(self, batch: ForwardBatch) -> Tokens:
        """This rank's block."""
        return self.ctx.block_tokens(batch)

    def dispatch_a(self, state: OperationState) -> None:
        """Start to send each owner its tokens, or everyone all, and what they are routed by."""
        ctx, backend = self.ctx, self.ctx.backend
        x, routing = state.peek("moe_input"), state.take("routing")
        own = self.tokens(state.peek("batch"))
        real = max(0, min(own.stop, own.batch.num_tokens) - own.start)
        packed = backend.math.pack_routing(routing, real)
        if ctx.parallel.ep:
            per_rank = self.moe.n_routed_experts // ctx.parallel.tp
            x = backend.block_for_each(x, routing, ctx.parallel.tp, per_rank)
        kind = "all_to_all" if ctx.parallel.ep else "all_gather"
        state.put(
            tokens_under_way=self._begin(state, kind, "tokens", x),
            routing_under_way=self._begin(state, "all_gather", "routing", packed, width=4),
        )

    def dispatch_b(self, state: OperationState) -> None:
        """Wait for the tokens of all ranks and lay out those of the local experts."""
        backend = self.ctx.backend
        x = backend.finish(state.take("tokens_under_way"))
        routing = backend.math.unpack_routing(backend.finish(state.take("routing_under_way")))
        state.put(routing=routing, dispatched=self.lay_out(x, routing, state))

    def combine_a(self, state: OperationState) -> None:
        """Start to send each rank its tokens' results."""
        kind = "all_to_all" if self.ctx.parallel.ep else "reduce_scatter"
        state.put(results_under_way=self._begin(state, kind, "results", self.weigh(state)))

    def combine_b(self, state: OperationState) -> None:
        """Wait for the results of all ranks and sum them."""
        backend = self.ctx.backend
        results = backend.finish(state.take("results_under_way"))
        if self.ctx.parallel.ep:
            results = backend.sum_blocks(results, self.ctx.parallel.tp)
        state.put(routed_output=results)

    def output(self, state: OperationState, total: Any) -> None:
        """Nothing is left to sum over ranks."""
        state.put(sublayer_output=self.ctx.backend.math.round_hidden(total))

    def _begin(
        self, state: OperationState, kind: str, what: str, x: Any, *, width: int = 2
    ) -> Begun:
        # Two batches may have theirs under way at a time.
        name = f"{what} of {state.peek('half')}"
        return self.ctx.backend.begin(kind, name, x, self.ctx.tp_group, width=width)


def make_dispatcher(
    ctx: RankContext, moe: MoeConfig, experts: tuple[int, int], intermediate: int
) -> Dispatcher:
    """What the layout asks for."""
    kind = ScatteredTokens if ctx.scatters else ReplicatedTokens
    return kind(ctx, moe, experts, intermediate)
