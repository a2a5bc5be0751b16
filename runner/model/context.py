"""The context of a layer: its rank's backend, weights and place in the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from runner.backend.base import Backend
from runner.backend.forward_batch import ForwardBatch, Tokens
from runner.backend.tensor import Fp8Weight, Tensor
from runner.backend.weights import Shard, WeightRequest, WeightSource, shard
from runner.config.parallel import ParallelConfig, RankCoordinates
from runner.kernels.heuristics_sm90 import ceil_div


@dataclass(frozen=True)
class RankContext:
    """What the layers of one rank need: backend, weights, layout and rank."""

    backend: Backend
    weights: WeightSource
    parallel: ParallelConfig
    rank: int

    # -- the layout -------------------------------------------------------------------------------

    @cached_property
    def at(self) -> RankCoordinates:
        return self.parallel.coordinates(self.rank)

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank is on the last stage, which computes logits."""
        return self.at.pp_rank == self.parallel.pp - 1

    @cached_property
    def tp_group(self) -> tuple[int, ...]:
        """Ranks that share this stage's layers."""
        return self.parallel.tp_group(self.rank)

    @cached_property
    def attn_tp_group(self) -> tuple[int, ...]:
        """Ranks that share the attention of this rank's tokens."""
        return self.parallel.attn_tp_group(self.rank)

    @cached_property
    def cp_group(self) -> tuple[int, ...]:
        """Ranks over which EXTEND tokens are split."""
        return self.parallel.attn_cp_group(self.rank)

    def tp_shard(self, size: int) -> Shard:
        """This rank's part of a dimension cut over the tensor-parallel ranks."""
        return shard(size, self.parallel.tp, self.at.tp_rank)

    def attn_shard(self, size: int) -> Shard:
        """This rank's part of a dimension cut over the attention's tensor-parallel ranks."""
        parts = self.parallel.attn_tp
        return shard(size, parts, self.at.tp_rank % parts)

    # -- weights ----------------------------------------------------------------------------------

    def fp8(self, layer: int, name: str, *dims: int | Shard, grouped: bool = False) -> Fp8Weight:
        """An FP8 weight [n, k] or [groups, n, k]: k is the last of ``dims``, n the others' product.

        Its values have a standard deviation of k ** -0.5, where k is the global size.
        """
        parts = _shards(dims)
        *outer, k = (part.width for part in parts)
        view = (outer[0], prod(outer[1:]), k) if grouped else (prod(outer), k)
        scale = parts[-1].size ** -0.5
        return self.weights.make_fp8(WeightRequest(layer, name, "fp8", parts, view, scale))

    def bf16(self, layer: int, name: str, *dims: int | Shard, scale: float | None = None) -> Tensor:
        """A bf16 weight; the default standard deviation ``scale`` is the last dimension ** -0.5."""
        default = _shards(dims)[-1].size ** -0.5
        return self._weight(layer, name, "bf16", dims, default if scale is None else scale)

    def fp32(
        self, layer: int, name: str, *dims: int | Shard, scale: float, mean: float = 0.0
    ) -> Tensor:
        return self._weight(layer, name, "fp32", dims, scale, mean)

    def norm(self, layer: int, name: str, width: int) -> Tensor:
        """Weights of a norm: bf16 around 1."""
        return self._weight(layer, name, "bf16", (width,), 0.1, 1.0)

    def ids(self, layer: int, name: str, *dims: int, high: int) -> Tensor:
        """A table of int64 in [0, ``high``)."""
        return self._weight(layer, name, "ids", dims, 1.0, high=high)

    def _weight(
        self,
        layer: int,
        name: str,
        kind: str,
        dims: Sequence[int | Shard],
        scale: float,
        mean: float = 0.0,
        high: int = 0,
    ) -> Tensor:
        parts = _shards(dims)
        view = tuple(part.width for part in parts)
        return self.weights.make(WeightRequest(layer, name, kind, parts, view, scale, mean, high))

    # -- this rank's tokens -----------------------------------------------------------------------

    def splits_tokens(self, batch: ForwardBatch) -> bool:
        """Whether each context-parallel rank has only its part of the tokens."""
        return batch.mode.is_extend and self.parallel.attn_cp > 1

    def tokens(self, batch: ForwardBatch) -> Tokens:
        """The new tokens that this rank's hidden states are for."""
        if not self.splits_tokens(batch):
            return batch.tokens
        index = self.cp_group.index(self.rank)
        own = shard(batch.num_tokens, self.parallel.attn_cp, index)
        return Tokens(batch, own.start, own.stop)

    @property
    def scatters(self) -> bool:
        """Whether, outside attention, each tensor rank has only its own block of the tokens."""
        return self.parallel.moe_a2a and self.parallel.tp > 1

    def block_tokens(self, batch: ForwardBatch) -> Tokens:
        """This rank's block of tokens; blocks have equal length, so the last may be all padding."""
        rows = ceil_div(batch.num_tokens, self.parallel.tp)
        return Tokens(batch, self.at.tp_rank * rows, (self.at.tp_rank + 1) * rows)

    def own_rows(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """Select this rank's rows from rows of all tokens."""
        own = self.tokens(batch)
        return x if own.count == batch.num_tokens else x[own.start : own.stop]

    def scatter(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """Select this rank's block from rows that every rank has: [T, ...] -> [block, ...]."""
        if not self.scatters:
            return x
        own = self.block_tokens(batch)
        return self.backend.padded(x, own.count * self.parallel.tp)[own.start : own.stop]

    def gather(self, name: str, x: Tensor, batch: ForwardBatch) -> Tensor:
        """Gather all rows from the tensor ranks' blocks: [block, ...] -> [T, ...]."""
        if not self.scatters:
            return x
        every = self.backend.all_gather(name, x, self.tp_group, 0)
        return self.backend.padded(every, batch.num_tokens)

    def gather_tokens(self, name: str, x: Tensor, batch: ForwardBatch) -> Tensor:
        """Gather all tokens' rows from the context-parallel ranks."""
        if not self.splits_tokens(batch):
            return x
        return self.backend.all_gather(name, x, self.cp_group, 0)

    def sum_hidden(
        self, name: str, x: Tensor, group: tuple[int, ...], batch: ForwardBatch
    ) -> Tensor:
        """Sum partial results [T, H] over ``group``; returns all rows or just this rank's block."""
        if not self.scatters:
            return self.backend.all_reduce(name, x, group).bfloat16()
        rows = self.block_tokens(batch).count * self.parallel.tp
        return self.backend.reduce_scatter(name, self.backend.padded(x, rows), group).bfloat16()


def _shards(dims: Sequence[int | Shard]) -> tuple[Shard, ...]:
    return tuple(dim if isinstance(dim, Shard) else Shard(dim, 0, dim) for dim in dims)
