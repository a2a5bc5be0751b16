"""Expert selection and grouped GEMM layouts in torch; the host never waits for the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from runner.backend.forward_batch import Tokens
from runner.backend.tensor import Dispatched, Routing
from runner.backend.torch_cache import ids_of
from runner.config.model import MoeConfig
from runner.deep_gemm_wrapper.quantise import widen
from runner.kernels.heuristics_sm90 import CONTIGUOUS_M_ALIGNMENT


class ExpertMath:
    """Math of ``ExpertSteps``; see the steps for shapes."""

    def top_k(self, logits: Tensor, bias: Tensor, config: MoeConfig) -> Routing:
        scores = _scores(logits, config)
        ranked = scores + bias
        if config.n_group > 1:
            ranked = _best_groups(ranked, config)
        return _weighted(scores, ranked.topk(config.num_experts_per_tok, -1).indices, config)

    def hash_top_k(
        self, logits: Tensor, table: Tensor, tokens: Tokens, config: MoeConfig
    ) -> Routing:
        ids = table[ids_of(tokens, logits.device)]
        return _weighted(_scores(logits, config), ids, config)

    def pack_routing(self, routing: Routing, tokens: int) -> Tensor:
        # fp32 represents ids below 2**24 exactly.
        packed = torch.cat([routing.weights, routing.ids.to(routing.weights.dtype)], -1)
        packed[tokens:, : routing.ids.shape[1]] = 0.0
        packed[tokens:, routing.ids.shape[1] :] = -1.0
        return packed

    def unpack_routing(self, packed: Tensor) -> Routing:
        weights, ids = packed.chunk(2, -1)
        return Routing(weights.contiguous(), ids.long())

    def block_for_each(self, x: Tensor, ids: Tensor, ranks: int, per_rank: int) -> Tensor:
        owner = torch.arange(ranks, device=x.device).view(-1, 1, 1)
        chosen = (ids.unsqueeze(0) // per_rank == owner).any(-1)
        return (x.unsqueeze(0) * chosen.unsqueeze(-1)).flatten(0, 1)

    def sum_blocks(self, x: Tensor, blocks: int) -> Tensor:
        total: Tensor = widen(x).unflatten(0, (blocks, -1)).sum(0)
        return total.to(x.dtype)

    def dispatch_contiguous(
        self, x: Tensor, ids: Tensor, experts: tuple[int, int], rows: int
    ) -> Dispatched:
        """Sort tokens by local expert into ``rows`` rows; each expert is padded to 128 rows."""
        local, rank, counts = _rank_in_expert(ids, experts)
        padded = -(-counts // CONTIGUOUS_M_ALIGNMENT) * CONTIGUOUS_M_ALIGNMENT
        ends = padded.cumsum(0)
        starts = ends - padded
        num_local = experts[1] - experts[0]
        slots = torch.where(local < num_local, starts[local.clamp_max(num_local - 1)] + rank, -1)
        row = torch.arange(rows, device=x.device)
        group = torch.searchsorted(ends, row, right=True)
        owner = group.clamp_max(num_local - 1)
        used = (group < num_local) & (row - starts[owner] < counts[owner])
        groups = torch.where(used, owner, -1).to(torch.int32)
        return Dispatched(_scatter(x, slots, rows, ids.shape[1]), groups, slots, rows)

    def dispatch_masked(
        self, x: Tensor, ids: Tensor, experts: tuple[int, int], rows: int, expected_m: int
    ) -> Dispatched:
        """Put tokens into one block of ``rows`` rows per local expert."""
        local, rank, counts = _rank_in_expert(ids, experts)
        num_local = experts[1] - experts[0]
        slots = torch.where(local < num_local, local * rows + rank, -1)
        grid = _scatter(x, slots, num_local * rows, ids.shape[1]).unflatten(0, (num_local, rows))
        return Dispatched(grid, counts.to(torch.int32), slots, expected_m)

    def combine_expert_outputs(
        self, y: Tensor, slots: Tensor, routing: Routing, factor: float
    ) -> Tensor:
        flat = y.reshape(-1, y.shape[-1])
        tokens, choices = routing.ids.shape
        total = torch.zeros((tokens, y.shape[-1]), dtype=widen(flat[:0]).dtype, device=y.device)
        for choice, column in enumerate(slots.view(tokens, choices).unbind(1)):
            weight = torch.where(column >= 0, routing.weights[:, choice], 0.0).unsqueeze(1)
            # Rows that no expert wrote may contain NaN, so a weight of 0 would not remove them.
            rows = torch.where(weight > 0, widen(flat[column.clamp_min(0)]), 0.0)
            total += rows * weight
        return (total * factor).to(y.dtype)


def _scores(logits: Tensor, config: MoeConfig) -> Tensor:
    if config.scoring_func == "sigmoid":
        return logits.sigmoid()
    softplus: Tensor = torch.nn.functional.softplus(logits)
    return softplus.sqrt()


def _best_groups(ranked: Tensor, config: MoeConfig) -> Tensor:
    """Keep the ``topk_group`` groups whose two best experts have the highest sum of scores."""
    groups = ranked.unflatten(-1, (config.n_group, -1))
    best = groups.topk(2, -1).values.sum(-1).topk(config.topk_group, -1).indices
    keep = torch.zeros(groups.shape[:-1], dtype=torch.bool, device=ranked.device)
    keep.scatter_(-1, best, True)
    kept: Tensor = groups.masked_fill(~keep.unsqueeze(-1), float("-inf"))
    return kept.flatten(-2)


def _weighted(scores: Tensor, ids: Tensor, config: MoeConfig) -> Routing:
    weights = scores.gather(-1, ids)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(weights, ids)


def _rank_in_expert(ids: Tensor, experts: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Local expert of each choice (E if not local), its index within that expert, and counts."""
    num_local = experts[1] - experts[0]
    flat = ids.flatten()
    outside = (flat < experts[0]) | (flat >= experts[1])
    local = torch.where(outside, num_local, flat - experts[0])
    counts = torch.zeros(num_local + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, local, torch.ones_like(local))
    order = local.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(local)
    rank[order] = torch.arange(len(flat), device=ids.device) - starts[local[order]]
    return local, rank, counts[:num_local]


def _scatter(x: Tensor, slots: Tensor, rows: int, choices: int) -> Tensor:
    """Copy each token's row to its slots; slot -1 goes to a spare row that is cut off."""
    grid = torch.zeros((rows + 1, x.shape[1]), dtype=x.dtype, device=x.device)
    source = torch.arange(x.shape[0], device=x.device).repeat_interleave(choices)
    grid[torch.where(slots >= 0, slots, rows)] = x[source]
    return grid[:rows]
