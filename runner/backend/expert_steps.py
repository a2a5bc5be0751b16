"""Steps of the mixture of experts."""

from __future__ import annotations

from math import prod
from typing import Any

from runner.backend.announcer import Announcer, bf16_bytes
from runner.backend.math import Dispatched, Routing, Tokens
from runner.backend.token_to_m import contiguous_rows, masked_bytes, masked_expected_m, masked_rows
from runner.config.model import MoeConfig


class ExpertSteps(Announcer):
    """Choosing experts, and laying tokens out for them."""

    def top_k(self, logits: Any, bias: Any, config: MoeConfig) -> Routing:
        """See :meth:`Math.top_k`."""
        return self._compute("top_k", logits.nbytes, lambda: self.math.top_k(logits, bias, config))

    def hash_top_k(self, logits: Any, table: Any, tokens: Tokens, config: MoeConfig) -> Routing:
        """See :meth:`Math.hash_top_k`."""
        return self._compute(
            "hash_top_k",
            logits.nbytes,
            lambda: self.math.hash_top_k(logits, table, tokens, config),
        )

    def dispatch(
        self,
        x: Any,
        routing: Routing,
        experts: tuple[int, int],
        config: MoeConfig,
        intermediate: int,
        *,
        decode: bool,
    ) -> Dispatched:
        """Lay tokens out by local expert: masked in DECODE within the budget, else contiguous."""
        tokens, hidden = x.shape
        local = experts[1] - experts[0]
        rows = masked_rows(tokens)
        fits = masked_bytes(local, rows, hidden, intermediate) <= self.masked_budget
        choices = tokens * config.num_experts_per_tok
        if decode and fits:
            expected_m = masked_expected_m(choices, config.n_routed_experts)
            return self._compute(
                "dispatch_masked",
                2 * choices * hidden * 2,
                lambda: self.math.dispatch_masked(x, routing, experts, rows, expected_m),
            )
        rows = contiguous_rows(choices, local)
        return self._compute(
            "dispatch_contiguous",
            2 * choices * hidden * 2,
            lambda: self.math.dispatch_contiguous(x, routing, experts, rows),
        )

    def block_for_each(self, x: Any, routing: Routing, ranks: int, per_rank: int) -> Any:
        """See :meth:`Math.block_for_each`."""
        traffic = (1 + ranks) * bf16_bytes(x)
        return self._compute(
            "block_for_each", traffic, lambda: self.math.block_for_each(x, routing, ranks, per_rank)
        )

    def sum_blocks(self, x: Any, blocks: int) -> Any:
        """See :meth:`Math.sum_blocks`."""
        traffic = bf16_bytes(x) * (1 + blocks) // blocks
        return self._compute("sum_blocks", traffic, lambda: self.math.sum_blocks(x, blocks))

    def silu_and_mul(self, x: Any, limit: float) -> Any:
        """See :meth:`Math.silu_and_mul`."""
        return self._compute(
            "silu_and_mul", x.nbytes + x.nbytes // 2, lambda: self.math.silu_and_mul(x, limit)
        )

    def combine(self, y: Any, dispatched: Dispatched, routing: Routing, factor: float) -> Any:
        """See :meth:`Math.combine`."""
        choices = prod(routing.ids.shape)
        return self._compute(
            "combine",
            2 * choices * y.shape[-1],
            lambda: self.math.combine(y, dispatched.slots, routing, factor),
        )
