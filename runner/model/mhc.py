"""Manifold-constrained hyper-connections: several copies of the residual stream, mixed per token.

Before a sub-layer one GEMM (``TF32_HC_PRENORM_GEMM``) of the flattened stream with a
[hc_mult * (2 + hc_mult), hc_mult * hidden] matrix gives mixing weights; after it the stream is
rebuilt. Formulas: docs/models.md.
"""

from __future__ import annotations

from typing import Any

from runner.config.model import Dsv4Config
from runner.model.context import RankContext
from runner.model.operations import OperationState


class HyperConnection:
    """The mixing around one sub-layer of one layer."""

    def __init__(self, ctx: RankContext, config: Dsv4Config, layer: int, name: str) -> None:
        self._ctx, self._config = ctx, config
        copies = config.hc_mult
        mixes = copies * (2 + copies)
        width = config.hc_hidden_size
        self._fn = ctx.replicated(layer, f"{name}_hc_fn", "fp32", mixes, width, scale=0.02)
        self._base = ctx.replicated(layer, f"{name}_hc_base", "fp32", mixes, scale=0.1)
        self._scale = ctx.replicated(layer, f"{name}_hc_scale", "fp32", 3, scale=0.1, mean=1.0)
        self._norm = ctx.replicated(
            layer, f"{name}_norm", "bf16", config.hidden_size, scale=0.1, mean=1.0
        )

    def pre(self, state: OperationState) -> None:
        """hidden_states [T, M * H] -> sublayer_input [T, H]; keeps the stream and its mixing."""
        backend = self._ctx.backend
        stream = state.take("hidden_states")
        gemm = backend.hc_prenorm(stream, self._fn)
        layer_input, post, comb = backend.hc_pre(
            stream, gemm, self._base, self._scale, self._config
        )
        normed = backend.rms_norm(layer_input, self._norm, self._config.rms_norm_eps)
        state.put(sublayer_input=normed, residual=(stream, post, comb))

    def post(self, state: OperationState) -> None:
        """sublayer_output [T, H] -> hidden_states [T, M * H]."""
        stream, post, comb = state.take("residual")
        output = state.take("sublayer_output")
        state.put(hidden_states=self._ctx.backend.hc_post(output, stream, post, comb))


class HyperHead:
    """Collapses the copies before the final norm."""

    def __init__(self, ctx: RankContext, config: Dsv4Config) -> None:
        self._ctx, self._config = ctx, config
        copies, width = config.hc_mult, config.hc_hidden_size
        self._fn = ctx.replicated(-1, "hc_head_fn", "fp32", copies, width, scale=0.02)
        self._base = ctx.replicated(-1, "hc_head_base", "fp32", copies, scale=0.1)
        self._scale = ctx.replicated(-1, "hc_head_scale", "fp32", 1, scale=0.1, mean=1.0)

    def __call__(self, hidden_states: Any) -> Any:
        """[T, M * H] -> [T, H]."""
        backend = self._ctx.backend
        return backend.hc_head(hidden_states, self._fn, self._base, self._scale, self._config)
