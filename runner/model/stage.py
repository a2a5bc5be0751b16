"""A pipeline stage: embedding on the first, its layers, head on the last."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from runner.backend.forward_batch import ForwardBatch, PPProxyTensors, proxy_widths
from runner.backend.math import Tokens
from runner.backend.weights import WeightRequest
from runner.config.model import Dsv3Config, Dsv4Config, ModelConfig
from runner.errors import UserError
from runner.model.context import RankContext
from runner.model.dsv3 import Dsv3Family
from runner.model.dsv4 import Dsv4Family
from runner.model.operations import (
    OperationState,
    execute_operations,
    execute_overlapped_operations,
)
from runner.model.strategy import PLAIN, OverlapStrategy, concatenate

Tensors = dict[str, Any]

OVERLAPPED = "overlapped by"
"""What the mark of layers that run in halves says between their numbers and the strategy."""


class PipelineStage:
    """The part of the model that one rank holds, and its forward.

    Args:
        ctx: the rank.
        model: the whole model.
        overlap: strategies by which two halves of a batch overlap; forwards of other modes, and
            batches of one sequence, run as they are.
    """

    def __init__(
        self, ctx: RankContext, model: ModelConfig, overlap: Sequence[OverlapStrategy] = ()
    ) -> None:
        self._ctx, self._model = ctx, model
        self._overlap = {strategy.mode: strategy for strategy in overlap}
        pp = ctx.parallel.pp
        self.is_first = ctx.at.pp_rank == 0
        self.is_last = ctx.at.pp_rank == pp - 1
        self.layer_ids = ctx.parallel.layer_range(model.num_hidden_layers, ctx.at.pp_rank)
        self._family: Any = _make_family(ctx, model, self.layer_ids)
        self._layers: list[tuple[int, Any]] = list(
            zip(self.layer_ids, self._family.layers, strict=True)
        )
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

    def overlapped(self, overlap: Sequence[OverlapStrategy]) -> PipelineStage:
        """The same stage with other strategies."""
        stage = copy(self)
        stage._overlap = {strategy.mode: strategy for strategy in overlap}
        return stage

    def _vocab_weight(self, name: str, rows: tuple[int, int], *, scale: float) -> Any:
        hidden = self._model.hidden_size
        return self._ctx.make(
            WeightRequest(
                -1,
                name,
                "bf16",
                (self._model.vocab_size, hidden),
                (rows, (0, hidden)),
                (rows[1] - rows[0], hidden),
                scale=scale,
            )
        )

    def forward(self, batch: ForwardBatch, proxy: PPProxyTensors | None) -> Any:
        """Run the stage.

        Args:
            batch: what to run.
            proxy: the stage before's tensors; None on the first stage.

        Returns:
            :class:`PPProxyTensors` on inner stages, logits [sequences, vocab] on the last.
        """
        self._ctx.backend.mark("forward", f"{batch.mode.name} {batch.num_tokens}")
        tensors = self._enter(batch, proxy)
        strategy = self._overlap.get(batch.mode)
        halves = batch.halves if strategy else None
        if strategy is None or halves is None:
            tensors = self._run_plain(self._layers, tensors, batch)
        else:
            dense = [pair for pair in self._layers if not pair[1].has_experts]
            sparse = [pair for pair in self._layers if pair[1].has_experts]
            tensors = self._run_plain(dense, tensors, batch)
            tensors = self._run_overlapped(sparse, tensors, halves, strategy)
        return self._logits(tensors, batch) if self.is_last else PPProxyTensors(tensors)

    def _run_plain(
        self, layers: Sequence[tuple[int, Any]], tensors: Tensors, batch: ForwardBatch
    ) -> Tensors:
        """The whole batch through layers, one after the other."""
        if not layers:
            return tensors
        backend = self._ctx.backend
        state = self._begin(tensors, batch, half=0)
        for layer_id, layer in layers:
            backend.mark("layer", str(layer_id))
            operations = layer.operations()
            steps = PLAIN[batch.mode].arrange(operations) if layer.has_experts else operations
            execute_operations(state, steps, backend.mark)
        backend.mark("layer", "end")
        return self._end(state, batch)

    def _run_overlapped(
        self,
        layers: Sequence[tuple[int, Any]],
        tensors: Tensors,
        halves: tuple[ForwardBatch, ForwardBatch],
        strategy: OverlapStrategy,
    ) -> Tensors:
        """Both halves through all layers' stages, in turns."""
        if not layers:
            return tensors
        backend = self._ctx.backend
        backend.mark("layer", f"{layers[0][0]}-{layers[-1][0]} {OVERLAPPED} {strategy.name}")
        whole = concatenate((strategy, layer.operations()) for _, layer in layers)
        with backend.leaving_sms(whole.comm_sms):
            cut = halves[0].num_tokens
            parts = (
                self._rows(tensors, 0, cut),
                self._rows(tensors, cut, cut + halves[1].num_tokens),
            )
            first, second = (
                self._begin(part, half, half=index)
                for index, (part, half) in enumerate(zip(parts, halves, strict=True))
            )
            execute_overlapped_operations(
                (first, second), (whole.stages, whole.stages), whole.delta_stages, backend.mark
            )
            ends = self._end(first, halves[0]), self._end(second, halves[1])
        return {
            name: None if ends[0][name] is None else backend.joined(ends[0][name], ends[1][name])
            for name in tensors
        }

    def _rows(self, tensors: Tensors, start: int, stop: int) -> Tensors:
        return {
            name: None if x is None else self._ctx.backend.rows(x, start, stop)
            for name, x in tensors.items()
        }

    def _begin(self, tensors: Tensors, batch: ForwardBatch, *, half: int) -> OperationState:
        """A batch's state before its first layer, its rows this rank's own."""
        own = {name: self._ctx.scatter(x, batch) for name, x in tensors.items()}
        return OperationState(batch=batch, half=half, **self._family.batch_state(batch), **own)

    def _end(self, state: OperationState, batch: ForwardBatch) -> Tensors:
        """What is left after a batch's last layer, all its rows."""
        names = list(proxy_widths(self._model.hidden_size, self._model.hc_mult))
        shared = self._family.shared
        values = state.finish("batch", "half", *shared, *names)[2 + len(shared) :]
        return {
            name: self._ctx.gather(name, x, batch) for name, x in zip(names, values, strict=True)
        }

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
