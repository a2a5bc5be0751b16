"""Where a layer runs: one rank's backend, weights and place in the layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from runner.backend.base import Backend
from runner.backend.math import Tokens
from runner.backend.weights import WeightRequest, WeightSource, shard, whole
from runner.config.parallel import ParallelConfig, RankCoordinates
from runner.forward_batch import ForwardBatch


@dataclass(frozen=True)
class RankContext:
    """One rank of the layout, as its layers see it."""

    backend: Backend
    weights: WeightSource
    parallel: ParallelConfig
    rank: int

    @cached_property
    def at(self) -> RankCoordinates:
        """This rank's replica, stage and tensor rank."""
        return self.parallel.coordinates(self.rank)

    @cached_property
    def tp_group(self) -> tuple[int, ...]:
        """Ranks that share this stage's layers."""
        return self.parallel.tp_group(self.rank)

    @cached_property
    def attn_tp_group(self) -> tuple[int, ...]:
        """Ranks that share the attention of this rank's tokens."""
        size = self.parallel.attn_tp
        first = self.at.tp_rank // size * size
        return self.tp_group[first : first + size]

    @cached_property
    def cp_group(self) -> tuple[int, ...]:
        """Ranks among which EXTEND tokens are split."""
        return self.parallel.attn_cp_group(self.rank)

    def tp_shard(self, size: int) -> tuple[int, int]:
        """This rank's part of a dimension cut over the tensor-parallel ranks."""
        return shard(size, self.parallel.tp, self.at.tp_rank)

    def attn_shard(self, size: int) -> tuple[int, int]:
        """This rank's part of a dimension cut over the attention's tensor-parallel ranks."""
        size_of_group = self.parallel.attn_tp
        return shard(size, size_of_group, self.at.tp_rank % size_of_group)

    def splits_tokens(self, batch: ForwardBatch) -> bool:
        """Whether each context-parallel rank holds only its part of the tokens."""
        return batch.mode.is_extend and self.parallel.attn_cp > 1

    def tokens(self, batch: ForwardBatch) -> Tokens:
        """The new tokens that this rank's hidden states hold."""
        if not self.splits_tokens(batch):
            return Tokens(batch, 0, batch.num_tokens)
        index = self.cp_group.index(self.rank)
        return Tokens(batch, *shard(batch.num_tokens, self.parallel.attn_cp, index))

    def gather_tokens(self, name: str, x: Any, batch: ForwardBatch) -> Any:
        """All tokens' rows from each context-parallel rank's own."""
        if not self.splits_tokens(batch):
            return x
        return self.backend.all_gather(name, x, self.cp_group, 0)

    def make(self, request: WeightRequest) -> Any:
        """A weight of this rank."""
        return self.weights.make(request)

    def replicated(
        self, layer: int, name: str, kind: str, *shape: int, scale: float = 1.0, mean: float = 0.0
    ) -> Any:
        """A weight that every rank holds whole."""
        return self.make(whole(layer, name, kind, shape, scale=scale, mean=mean))
