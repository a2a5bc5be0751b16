"""A pipeline stage: its layers, with the embedding on the first stage and the head on the last."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from runner.backend.forward_batch import ForwardBatch, PPProxyTensors
from runner.backend.tensor import Tensor
from runner.config.model import Dsv3Config, Dsv4Config, ModelConfig
from runner.model.context import RankContext
from runner.model.dsv3 import Dsv3Decoder, Dsv3Layer
from runner.model.dsv4 import Dsv4Decoder, Dsv4Layer
from runner.model.operations import LayerState, run_overlapped
from runner.model.strategy import PLAIN, OverlapStrategy, concatenate

Layers = Sequence[tuple[int, Dsv3Layer | Dsv4Layer]]

OVERLAPPED = "overlapped by"
"""Text between layer numbers and strategy in the mark of layers that overlap two halves."""


class PipelineStage:
    """One rank's part of the model, and its forward.

    In modes with a strategy in ``overlap``, the two halves of a batch overlap; forwards in other
    modes, and batches of one sequence, run as one batch.
    """

    def __init__(
        self, ctx: RankContext, model: ModelConfig, overlap: Sequence[OverlapStrategy] = ()
    ) -> None:
        self._ctx, self._model = ctx, model
        self._overlap = {strategy.mode: strategy for strategy in overlap}
        self.is_first, self.is_last = ctx.at.pp_rank == 0, ctx.is_last_stage
        self.layer_ids = ctx.parallel.layer_range(model.num_hidden_layers, ctx.at.pp_rank)
        self._decoder = _make_decoder(ctx, model, self.layer_ids)
        self._layers: Layers = list(zip(self.layer_ids, self._decoder.layers, strict=True))
        self._vocab = ctx.tp_shard(model.vocab_size)
        hidden = model.hidden_size
        if self.is_first:
            self._embedding = ctx.bf16(-1, "embedding", self._vocab, hidden, scale=1.0)
        if self.is_last:
            self._norm = ctx.norm(-1, "final_norm", hidden)
            self._lm_head = ctx.bf16(-1, "lm_head", self._vocab, hidden)

    def overlapped(self, overlap: Sequence[OverlapStrategy]) -> PipelineStage:
        stage = copy(self)
        stage._overlap = {strategy.mode: strategy for strategy in overlap}
        return stage

    def forward(self, batch: ForwardBatch, proxy: PPProxyTensors | None) -> PPProxyTensors | Tensor:
        """Run the stage: returns logits [sequences, vocab] on the last, proxy tensors on others.

        ``proxy`` has the previous stage's proxy tensors; None on the first stage.
        """
        self._ctx.backend.mark("forward", f"{batch.mode.name} {batch.num_tokens}")
        if self.is_first:
            tensors = self._embed(batch)
        else:
            assert proxy is not None, "inner stages need proxy tensors"
            tensors = proxy
        strategy = self._overlap.get(batch.mode)
        halves = batch.halves if strategy else None
        if strategy is None or halves is None:
            tensors = self._run_plain(self._layers, tensors, batch)
        else:
            dense = [pair for pair in self._layers if not pair[1].has_experts]
            sparse = [pair for pair in self._layers if pair[1].has_experts]
            tensors = self._run_plain(dense, tensors, batch)
            tensors = self._run_overlapped(sparse, tensors, halves, strategy)
        return self._logits(tensors, batch) if self.is_last else tensors

    def _run_plain(
        self, layers: Layers, tensors: PPProxyTensors, batch: ForwardBatch
    ) -> PPProxyTensors:
        """Run the whole batch through layers, one after the other."""
        if not layers:
            return tensors
        mark = self._ctx.backend.mark
        state = self._begin(tensors, batch, half=0)
        for layer_id, layer in layers:
            mark("layer", str(layer_id))
            operations = layer.operations()
            strategy = PLAIN[batch.mode]
            steps = strategy.arrange(operations) if layer.has_experts else operations.values()
            for step in steps:
                if isinstance(step, str):
                    mark("yield", "")
                else:
                    step(state)
        mark("layer", "end")
        return self._end(state, batch)

    def _run_overlapped(
        self,
        layers: Layers,
        tensors: PPProxyTensors,
        halves: tuple[ForwardBatch, ForwardBatch],
        strategy: OverlapStrategy,
    ) -> PPProxyTensors:
        """Run both halves through all layers' stages, taking turns."""
        if not layers:
            return tensors
        backend = self._ctx.backend
        backend.mark("layer", f"{layers[0][0]}-{layers[-1][0]} {OVERLAPPED} {strategy.name}")
        stages = concatenate(strategy, [layer.operations() for _, layer in layers])
        cut = halves[0].num_tokens
        first = {name: x[:cut] for name, x in tensors.items()}
        second = {name: x[cut:] for name, x in tensors.items()}
        with backend.leaving_sms(strategy.comm_sms):
            states = self._begin(first, halves[0], half=0), self._begin(second, halves[1], half=1)
            run_overlapped(states, stages, strategy.delta_stages, backend.mark)
            ends = self._end(states[0], halves[0]), self._end(states[1], halves[1])
        return {name: backend.joined(x, ends[1][name]) for name, x in ends[0].items()}

    def _begin(self, tensors: PPProxyTensors, batch: ForwardBatch, *, half: int) -> LayerState:
        """A batch's state before its first layer, with only this rank's rows."""
        own = {name: self._ctx.scatter(x, batch) for name, x in tensors.items()}
        state: LayerState = {
            "batch": batch,
            "half": half,
            "index_metadata": self._decoder.index_metadata(batch),
            "hidden_states": own["hidden_states"],
        }
        if "residual" in own:
            state["residual"] = own["residual"]
        return state

    def _end(self, state: LayerState, batch: ForwardBatch) -> PPProxyTensors:
        """The tensors after a batch's last layer, with all rows."""
        tensors = {"hidden_states": state.pop("hidden_states")}
        if "residual" in state:
            tensors["residual"] = state.pop("residual")
        left = set(state) - {"batch", "half", "index_metadata"}
        if left:
            raise RuntimeError(f"operations left state behind: {', '.join(sorted(left))}")
        return {name: self._ctx.gather(name, x, batch) for name, x in tensors.items()}

    def _embed(self, batch: ForwardBatch) -> PPProxyTensors:
        """Tensors before the first layer: each rank embeds all tokens with its vocabulary shard.

        After the sum over ranks, context-parallel ranks keep only their own tokens.
        """
        ctx, backend = self._ctx, self._ctx.backend
        embedded = backend.embed(batch.tokens, self._embedding, self._vocab.start)
        embedded = backend.all_reduce("embedding", embedded, ctx.tp_group)
        return self._decoder.first_state(ctx.own_rows(embedded, batch))

    def _logits(self, tensors: PPProxyTensors, batch: ForwardBatch) -> Tensor:
        ctx, backend = self._ctx, self._ctx.backend
        hidden = self._decoder.collapse(tensors)
        hidden = backend.rms_norm(hidden, self._norm, self._model.rms_norm_eps)
        hidden = ctx.gather_tokens("hidden", hidden, batch)
        last = backend.last_tokens(hidden, ctx.tokens(batch))
        return backend.all_gather("logits", backend.linear(last, self._lm_head), ctx.tp_group, 1)


def _make_decoder(ctx: RankContext, model: ModelConfig, layers: range) -> Dsv4Decoder | Dsv3Decoder:
    if isinstance(model, Dsv4Config):
        return Dsv4Decoder(ctx, model, layers)
    assert isinstance(model, Dsv3Config)
    return Dsv3Decoder(ctx, model, layers)
