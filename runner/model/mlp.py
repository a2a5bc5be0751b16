"""Gated MLP on FP8 GEMMs: shared experts and the dense layers."""

from __future__ import annotations

from typing import Any

from runner.backend.weights import WeightRequest
from runner.model.context import RankContext


class GatedMlp:
    """``down(silu(gate(x)) * up(x))``.

    Cut over the tensor-parallel ranks, each with a partial sum, unless ``sharded`` is False.
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
        inner = ctx.tp_shard(intermediate) if sharded else (0, intermediate)
        width = inner[1] - inner[0]
        self._gate_up = ctx.make(
            WeightRequest(
                layer,
                f"{name}_gate_up",
                "fp8",
                (2, intermediate, hidden),
                ((0, 2), inner, (0, hidden)),
                (2 * width, hidden),
                scale=hidden**-0.5,
            )
        )
        self._down = ctx.make(
            WeightRequest(
                layer,
                f"{name}_down",
                "fp8",
                (hidden, intermediate),
                ((0, hidden), inner),
                (hidden, width),
                scale=intermediate**-0.5,
            )
        )

    def __call__(self, x: Any) -> Any:
        """[T, H] -> [T, H], this rank's part of the sum where it is cut."""
        gate_up = self._backend.gemm_fp8(x, self._gate_up)
        return self._backend.gemm_fp8(
            self._backend.silu_and_mul(gate_up, self._limit), self._down, partial=True
        )
