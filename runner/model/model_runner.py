"""``ModelRunner``: one rank of the model, its dummy runs and its kernel warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runner.backend.base import Backend
from runner.backend.forward_batch import ForwardBatch, ForwardMode, PPProxyTensors
from runner.backend.tensor import Tensor
from runner.backend.weights import ShapeWeights, WeightSource
from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig, RankCoordinates
from runner.errors import UserError
from runner.model.context import RankContext
from runner.model.stage import PipelineStage
from runner.model.strategy import OverlapStrategy


@dataclass(frozen=True)
class ModelRunner:
    """One rank of the model.

    Attributes:
        is_generation: whether the model generates; this decides a dummy run's default mode.
    """

    model: ModelConfig
    parallel: ParallelConfig
    rank: int
    backend: Backend
    stage: PipelineStage
    is_generation: bool = True

    @classmethod
    def build(
        cls,
        model: ModelConfig,
        parallel: ParallelConfig,
        rank: int,
        *,
        backend: Backend,
        weights: WeightSource | None = None,
        overlap: Sequence[OverlapStrategy] = (),
    ) -> ModelRunner:
        """Build the rank's stage; without ``weights`` it has only shapes, for a recording.

        Raises:
            UserError: the model does not fit the layout.
        """
        parallel.check_fits(model)
        context = RankContext(backend, weights or ShapeWeights(), parallel, rank)
        stage = PipelineStage(context, model, overlap)
        return cls(model, parallel, rank, backend, stage)

    @property
    def at(self) -> RankCoordinates:
        """The rank's place in the layout; in recordings, tensor ranks may share one ``stage``."""
        return self.parallel.coordinates(self.rank)

    def forward(
        self, batch: ForwardBatch, proxy: PPProxyTensors | None = None
    ) -> PPProxyTensors | Tensor:
        return self.stage.forward(batch, proxy)

    def _dummy_run(
        self, batch_size: int, forward_mode_override: ForwardMode | None = None
    ) -> PPProxyTensors | Tensor:
        """Run this rank's stage on dummy input, without other stages.

        The mode is ``forward_mode_override``, else DECODE for a generation model, else EXTEND;
        everything after that follows this mode. As in SGLang, the batch has ``batch_size``
        sequences of one token each, so both modes run ``batch_size`` tokens.

        Returns:
            Proxy tensors on inner stages, logits on the last.

        Raises:
            UserError: ``batch_size`` is below 1 or not a multiple of ``attn_cp``.
        """
        return self.prepare_dummy_run(batch_size, forward_mode_override)()

    def prepare_dummy_run(
        self, batch_size: int, forward_mode_override: ForwardMode | None = None
    ) -> Callable[[], PPProxyTensors | Tensor]:
        """The forward of :meth:`_dummy_run` with its input already made, ready for capture."""
        if batch_size < 1 or batch_size % self.parallel.attn_cp:
            raise UserError(
                f"dummy batch size {batch_size} must be a positive multiple of "
                f"attn_cp={self.parallel.attn_cp}"
            )
        mode = forward_mode_override or (
            ForwardMode.DECODE if self.is_generation else ForwardMode.EXTEND
        )
        make = ForwardBatch.extend if mode.is_extend else ForwardBatch.decode
        batch = make(
            (1,) * batch_size,
            input_ids=self.dummy_ids(batch_size),
            cache=self.backend.new_cache(batch_size, 1),
        )
        proxy = self.dummy_proxy(batch)
        return lambda: self.forward(batch, proxy)

    def dummy_ids(self, tokens: int) -> tuple[int, ...] | None:
        """Token ids for a dummy batch; a recording has none."""
        return self.backend.dummy_ids(tokens, self.model.vocab_size)

    def dummy_proxy(self, batch: ForwardBatch) -> PPProxyTensors | None:
        """Proxy tensors of zeros; None on the first stage."""
        return self.proxy(batch, lambda name, shape: self.backend.zeros(*shape))

    def proxy(
        self, batch: ForwardBatch, make: Callable[[str, tuple[int, int]], Tensor]
    ) -> PPProxyTensors | None:
        """Input from the previous stage, made by ``make(name, shape)``; None on the first stage.

        Stage 0 has already split EXTEND tokens over ``attn_cp``.
        """
        if self.stage.is_first:
            return None
        names = ("hidden_states",) if self.model.hc_mult > 1 else ("hidden_states", "residual")
        rows = batch.num_tokens // (self.parallel.attn_cp if batch.mode.is_extend else 1)
        return {name: make(name, (rows, self.model.hc_hidden_size)) for name in names}
