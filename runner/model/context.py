"""Where a layer runs: one rank's backend, weights and place in the layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from runner.backend.base import Backend
from runner.backend.forward_batch import ForwardBatch
from runner.backend.math import Tokens
from runner.backend.weights import WeightRequest, WeightSource, shard, whole
from runner.config.parallel import ParallelConfig, RankCoordinates
from runner.kernels.heuristics_sm90 import ceil_div


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

    @property
    def scatters(self) -> bool:
        """Whether each tensor rank holds its own block of the tokens outside of attention."""
        return self.parallel.moe_a2a and self.parallel.tp > 1

    def block_tokens(self, batch: ForwardBatch) -> Tokens:
        """The tokens of this rank's block; as many on every rank, so the last may have none."""
        rows = ceil_div(batch.num_tokens, self.parallel.tp)
        return Tokens(batch, self.at.tp_rank * rows, (self.at.tp_rank + 1) * rows)

    def scatter(self, x: Any, batch: ForwardBatch) -> Any:
        """This rank's block of rows that every rank has: [T, ...] -> [block, ...]."""
        if x is None or not self.scatters:
            return x
        own = self.block_tokens(batch)
        whole_blocks = self.backend.padded(x, own.count * self.parallel.tp)
        return self.backend.rows(whole_blocks, own.start, own.stop)

    def gather(self, name: str, x: Any, batch: ForwardBatch) -> Any:
        """All tokens' rows from each tensor rank's block: [block, ...] -> [T, ...]."""
        if x is None or not self.scatters:
            return x
        every = self.backend.all_gather(name, x, self.tp_group, 0)
        return self.backend.padded(every, batch.num_tokens)

    def sum_hidden(self, name: str, x: Any, group: tuple[int, ...], batch: ForwardBatch) -> Any:
        """Partial results [T, H] summed over ``group``: all rows, or this rank's block."""
        if not self.scatters:
            return self.backend.sum_hidden(name, x, group)
        rows = self.block_tokens(batch).count * self.parallel.tp
        mine = self.backend.reduce_scatter(name, self.backend.padded(x, rows), group)
        return self.backend.math.round_hidden(mine)

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
