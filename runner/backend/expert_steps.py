"""Steps of the mixture of experts: choose experts, and lay tokens out for them."""

from __future__ import annotations

from math import prod

from runner.backend.forward_batch import Tokens
from runner.backend.step_runner import StepRunner
from runner.backend.tensor import Dispatched, Routing, Tensor, bf16_bytes, reshaped, spec
from runner.backend.token_to_m import (
    MASKED_BUDGET,
    contiguous_rows,
    masked_bytes,
    masked_expected_m,
    masked_rows,
)
from runner.config.model import MoeConfig


class ExpertSteps(StepRunner):
    """Selecting experts, dispatching tokens to them, and combining their outputs."""

    def top_k(self, logits: Tensor, bias: Tensor, config: MoeConfig) -> Routing:
        """The experts with the highest biased scores, from gate logits [T, experts] fp32."""
        shape = _routing_shape(logits.shape[0], config.num_experts_per_tok)
        return self._compute(
            "top_k", logits.nbytes, shape, lambda math: math.top_k(logits, bias, config)
        )

    def hash_top_k(
        self, logits: Tensor, table: Tensor, tokens: Tokens, config: MoeConfig
    ) -> Routing:
        """Experts looked up by token id in ``table`` [vocab, k] int64, weighted by the gate."""
        shape = _routing_shape(logits.shape[0], config.num_experts_per_tok)
        return self._compute(
            "hash_top_k",
            logits.nbytes,
            shape,
            lambda math: math.hash_top_k(logits, table, tokens, config),
        )

    def pack_routing(self, routing: Routing, tokens: int) -> Tensor:
        """Weights and ids side by side, [T, 2k] fp32; rows after ``tokens`` choose no expert."""
        rows, choices = routing.ids.shape
        shape = spec(rows, 2 * choices, dtype="fp32")
        return self._without_operation(shape, lambda math: math.pack_routing(routing, tokens))

    def unpack_routing(self, packed: Tensor) -> Routing:
        shape = _routing_shape(packed.shape[0], packed.shape[1] // 2)
        return self._without_operation(shape, lambda math: math.unpack_routing(packed))

    def dispatch(
        self,
        x: Tensor,
        routing: Routing,
        experts: tuple[int, int],
        config: MoeConfig,
        intermediate: int,
        *,
        decode: bool,
    ) -> Dispatched:
        """Lay tokens [T, H] out by local expert; ``experts`` is a range (first, last + 1).

        DECODE uses the masked layout if its buffers, for experts ``intermediate`` wide, fit in
        :data:`MASKED_BUDGET`; otherwise, and in EXTEND, the layout is contiguous. SGLang's
        automatic choice is similar, but compares with a share of the free memory.
        """
        tokens, hidden = x.shape
        local = experts[1] - experts[0]
        choices = tokens * config.num_experts_per_tok
        slots = spec(prod(routing.ids.shape), dtype="int64")
        nbytes, rows = 4 * choices * hidden, masked_rows(tokens)
        if decode and masked_bytes(local, rows, hidden, intermediate) <= MASKED_BUDGET:
            expected_m = masked_expected_m(choices, config.n_routed_experts)
            grid, used = spec(local, rows, hidden), spec(local, dtype="int32")
            return self._compute(
                "dispatch_masked",
                nbytes,
                Dispatched(grid, used, slots, expected_m),
                lambda math: math.dispatch_masked(x, routing.ids, experts, rows, expected_m),
            )
        most = contiguous_rows(choices, local)
        return self._compute(
            "dispatch_contiguous",
            nbytes,
            Dispatched(spec(most, hidden), spec(most, dtype="int32"), slots, most),
            lambda math: math.dispatch_contiguous(x, routing.ids, experts, most),
        )

    def block_for_each(self, x: Tensor, routing: Routing, ranks: int, per_rank: int) -> Tensor:
        """A block of rows for each of ``ranks`` ranks: [T, H] -> [ranks * T, H].

        A block holds the tokens that chose one of the rank's ``per_rank`` experts; the rows of
        other tokens are zero.
        """
        return self._compute(
            "block_for_each",
            (1 + ranks) * bf16_bytes(x),
            reshaped(x, ranks * x.shape[0], x.shape[1]),
            lambda math: math.block_for_each(x, routing.ids, ranks, per_rank),
        )

    def sum_blocks(self, x: Tensor, blocks: int) -> Tensor:
        """Sum of equal blocks of rows: [blocks * T, H] -> [T, H]."""
        return self._compute(
            "sum_blocks",
            bf16_bytes(x) * (1 + blocks) // blocks,
            reshaped(x, x.shape[0] // blocks, x.shape[1]),
            lambda math: math.sum_blocks(x, blocks),
        )

    def silu_and_mul(self, x: Tensor, limit: float) -> Tensor:
        """[..., 2 * N] -> [..., N]: silu(first half) * second half, clamped if limit > 0."""
        return self._compute(
            "silu_and_mul",
            x.nbytes + x.nbytes // 2,
            reshaped(x, *x.shape[:-1], x.shape[-1] // 2),
            lambda math: math.silu_and_mul(x, limit),
        )

    def combine_expert_outputs(
        self, y: Tensor, dispatched: Dispatched, routing: Routing, factor: float
    ) -> Tensor:
        """Weighted sum of each token's expert outputs, times ``factor``: [T, H]."""
        tokens, hidden = routing.ids.shape[0], y.shape[-1]
        return self._compute(
            "combine",
            2 * prod(routing.ids.shape) * hidden,
            spec(tokens, hidden),
            lambda math: math.combine_expert_outputs(y, dispatched.slots, routing, factor),
        )


def _routing_shape(tokens: int, choices: int) -> Routing:
    return Routing(spec(tokens, choices, dtype="fp32"), spec(tokens, choices, dtype="int64"))
