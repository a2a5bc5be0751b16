"""A pipeline stage: embedding on the first, its layers, head on the last."""

from __future__ import annotations

from typing import Any

from runner.backend.math import Tokens
from runner.backend.weights import WeightRequest
from runner.config.model import Dsv3Config, Dsv4Config, ModelConfig
from runner.errors import UserError
from runner.forward_batch import ForwardBatch, PPProxyTensors, proxy_widths
from runner.model.context import RankContext
from runner.model.dsv3 import Dsv3Family
from runner.model.dsv4 import Dsv4Family
from runner.model.operations import OperationState, execute_operations


class PipelineStage:
    """The part of the model that one rank holds, and its forward."""

    def __init__(self, ctx: RankContext, model: ModelConfig) -> None:
        self._ctx, self._model = ctx, model
        pp = ctx.parallel.pp
        self.is_first = ctx.at.pp_rank == 0
        self.is_last = ctx.at.pp_rank == pp - 1
        self.layer_ids = ctx.parallel.layer_range(model.num_hidden_layers, ctx.at.pp_rank)
        self._family: Any = _make_family(ctx, model, self.layer_ids)
        self._first_row, last_row = ctx.tp_shard(model.vocab_size)
        rows = (self._first_row, last_row)
        if self.is_first:
            self._embedding = self._vocab_weight("embedding", rows, scale=1.0)
        if self.is_last:
            self._norm = ctx.replicated(
                -1, "final_norm", "bf16", model.hidden_size, scale=0.1, mean=1.0
            )
            self._collapse = self._family.make_head()
            self._lm_head = self._vocab_weight("lm_head", rows, scale=model.hidden_size**-0.5)

    def _vocab_weight(self, name: str, rows: tuple[int, int], *, scale: float) -> Any:
        hidden = self._model.hidden_size
        return self._ctx.make(
            WeightRequest(
                -1, name, "bf16", (self._model.vocab_size, hidden), (rows, (0, hidden)),
                (rows[1] - rows[0], hidden), scale=scale,
            )
        )  # fmt: skip

    def forward(self, batch: ForwardBatch, proxy: PPProxyTensors | None) -> Any:
        """Run the stage.

        Args:
            batch: what to run.
            proxy: the stage before's tensors; None on the first stage.

        Returns:
            :class:`PPProxyTensors` on inner stages, logits [sequences, vocab] on the last.
        """
        backend = self._ctx.backend
        backend.mark("forward", f"{batch.mode.name} {batch.num_tokens}")
        values = self._enter(batch, proxy)
        shared = self._family.batch_state(batch)
        state = OperationState(batch=batch, **shared, **values)
        for layer_id, layer in zip(self.layer_ids, self._family.layers, strict=True):
            backend.mark("layer", str(layer_id))
            execute_operations(state, layer.operations(batch.mode), backend.mark)
        names = list(proxy_widths(self._model.hidden_size, self._model.hc_mult))
        results = state.finish("batch", *shared, *names)
        tensors = dict(zip(names, results[1 + len(shared) :], strict=True))
        return self._logits(tensors, batch) if self.is_last else PPProxyTensors(tensors)

    def _enter(self, batch: ForwardBatch, proxy: PPProxyTensors | None) -> dict[str, Any]:
        if not self.is_first:
            assert proxy is not None, "inner stages need proxy tensors"
            return dict(proxy.tensors)
        ctx, backend = self._ctx, self._ctx.backend
        # The vocabulary is cut over all tensor-parallel ranks, so all embed all tokens, and
        # context-parallel ranks keep their own afterwards.
        everyone = Tokens(batch, 0, batch.num_tokens)
        embedded = backend.embed(
            everyone, self._embedding, self._first_row, self._model.hidden_size
        )
        embedded = backend.all_reduce("embedding", embedded, ctx.tp_group)
        own = ctx.tokens(batch)
        if own.count < batch.num_tokens:
            embedded = backend.rows(embedded, own.start, own.stop)
        first: dict[str, Any] = self._family.first_state(embedded)
        return first

    def _logits(self, tensors: dict[str, Any], batch: ForwardBatch) -> Any:
        ctx, backend = self._ctx, self._ctx.backend
        hidden = self._family.collapse(self._collapse, tensors)
        hidden = backend.rms_norm(hidden, self._norm, self._model.rms_norm_eps)
        hidden = ctx.gather_tokens("hidden", hidden, batch)
        last = backend.last_tokens(hidden, ctx.tokens(batch))
        return backend.all_gather("logits", backend.linear(last, self._lm_head), ctx.tp_group, 1)


def _make_family(ctx: RankContext, model: ModelConfig, layers: range) -> Dsv4Family | Dsv3Family:
    if isinstance(model, Dsv4Config):
        return Dsv4Family(ctx, model, layers)
    if isinstance(model, Dsv3Config):
        return Dsv3Family(ctx, model, layers)
    raise UserError(f"model family {model.family!r} of {model.name} is not known")
