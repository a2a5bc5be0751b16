"""How a model is laid out over ranks, for the driver and the simulator alike.

World ranks are ordered by replica, then pipeline stage, then tensor rank, as in SGLang:
``rank = (replica * pp + pp_rank) * tp + tp_rank``.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.config.fields import OptionDetails, check_tuples, option
from runner.config.model import FP8_BLOCK, ModelConfig
from runner.errors import UserError


@dataclass(frozen=True)
class RankCoordinates:
    """Position of a world rank: its replica, stage and tensor rank."""

    replica: int
    pp_rank: int
    tp_rank: int


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of parallelism and their placement on nodes.

    ``ep`` spreads whole experts over the tensor-parallel ranks instead of slicing each expert.
    ``moe_a2a`` gives each tensor-parallel rank its own part of the tokens outside attention and
    moves them to the experts and back: by all-to-all with ``ep``, else by gather and scatter.
    ``attn_cp`` splits the tokens of an EXTEND batch over groups of tensor-parallel ranks; the
    attention's own tensor-parallel degree is then ``tp // attn_cp``.
    ``stage_layers`` gives the number of layers of each stage; None splits evenly.
    """

    pp: int = option(1, OptionDetails("Pipeline stages.", group="deployment"))
    tp: int = option(1, OptionDetails("Tensor-parallel ranks.", group="deployment"))
    ep: bool = option(
        False, OptionDetails("Whole experts per rank instead of slices.", group="deployment")
    )
    moe_a2a: bool = option(
        False,
        OptionDetails(
            "Each rank has a block of the tokens; they reach the experts by all-to-all (with "
            "--ep), or by gather and scatter.",
            group="deployment",
        ),
    )
    attn_cp: int = option(
        1,
        OptionDetails(
            "Number of ranks to split EXTEND tokens over in attention.", group="deployment"
        ),
    )
    stage_layers: tuple[int, ...] | None = option(
        None, OptionDetails("Layers of each stage.  [default: even]", group="deployment")
    )
    replicas: int = option(
        1,
        OptionDetails(
            "Copies of the whole pipeline that start together, each on its own nodes.",
            group="placement",
            metavar="R",
        ),
    )
    nodes: int = option(
        1,
        OptionDetails(
            "Nodes; ranks of a node share its cores and disk cache.  [default: one per stage]",
            group="placement",
        ),
    )

    def __post_init__(self) -> None:
        check_tuples(self)
        for name in ("pp", "tp", "attn_cp", "replicas", "nodes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.tp % self.attn_cp:
            raise UserError(f"attn_cp={self.attn_cp} must divide tp={self.tp}")
        if self.moe_a2a and self.attn_cp > 1:
            raise UserError(f"moe_a2a does not go with attn_cp={self.attn_cp}: both split tokens")
        if self.world_size % self.nodes:
            raise UserError(
                f"nodes={self.nodes} must divide the {self.world_size} ranks of "
                f"replicas={self.replicas} x pp={self.pp} x tp={self.tp}"
            )
        if self.stage_layers is not None and len(self.stage_layers) != self.pp:
            raise UserError(
                f"{len(self.stage_layers)} stage sizes were given for pp={self.pp} stages"
            )

    @property
    def world_size(self) -> int:
        """Number of ranks over all replicas."""
        return self.replicas * self.pp * self.tp

    @property
    def ranks_per_node(self) -> int:
        """Ranks that share a node's cores and disk cache."""
        return self.world_size // self.nodes

    @property
    def attn_tp(self) -> int:
        """Tensor-parallel degree of the attention."""
        return self.tp // self.attn_cp

    def coordinates(self, rank: int) -> RankCoordinates:
        """Replica, pipeline stage and tensor rank of a world rank."""
        if not 0 <= rank < self.world_size:
            raise UserError(f"rank {rank} is outside 0..{self.world_size - 1}")
        stage, tp_rank = divmod(rank, self.tp)
        replica, pp_rank = divmod(stage, self.pp)
        return RankCoordinates(replica, pp_rank, tp_rank)

    def rank_of(self, pp_rank: int, tp_rank: int, replica: int = 0) -> int:
        """World rank at the given coordinates."""
        return (replica * self.pp + pp_rank) * self.tp + tp_rank

    def node_of(self, rank: int) -> int:
        """Node that runs a world rank; nodes hold consecutive ranks."""
        return rank // self.ranks_per_node

    def tp_group(self, rank: int) -> tuple[int, ...]:
        """World ranks that hold the shards of this rank's layers."""
        first = rank - rank % self.tp
        return tuple(range(first, first + self.tp))

    def attn_tp_group(self, rank: int) -> tuple[int, ...]:
        """World ranks that share the attention of this rank's tokens."""
        first = rank - rank % self.attn_tp
        return tuple(range(first, first + self.attn_tp))

    def attn_cp_group(self, rank: int) -> tuple[int, ...]:
        """World ranks that split this rank's EXTEND tokens, in token order."""
        at = self.coordinates(rank)
        within = at.tp_rank % self.attn_tp
        return tuple(
            self.rank_of(at.pp_rank, cp * self.attn_tp + within, at.replica)
            for cp in range(self.attn_cp)
        )

    def layer_range(self, num_layers: int, pp_rank: int) -> range:
        """Layers of a stage."""
        sizes = stage_sizes(num_layers, self.pp, self.stage_layers)
        first = sum(sizes[:pp_rank])
        return range(first, first + sizes[pp_rank])

    def check_fits(self, model: ModelConfig) -> None:
        """Raise UserError if the model cannot be laid out like this."""
        stage_sizes(model.num_hidden_layers, self.pp, self.stage_layers)
        for name, size in model.tensor_parallel_sizes().items():
            degree = self.tp if name == "vocab_size" else self.attn_tp
            if size % degree:
                raise UserError(f"tp={degree} must divide {name}={size} of {model.name}")
        if self.ep and model.moe.n_routed_experts % self.tp:
            raise UserError(
                f"ep over tp={self.tp} must divide n_routed_experts="
                f"{model.moe.n_routed_experts} of {model.name}"
            )
        heads = model.num_attention_heads // self.attn_tp
        for name, width in model.fp8_head_widths().items():
            if heads * width % FP8_BLOCK:
                raise UserError(
                    f"tp={self.attn_tp} leaves {heads} heads of {width} in {name} of {model.name}: "
                    f"their product must be a multiple of {FP8_BLOCK} (FP8 scaling blocks)"
                )
        self._check_shard("moe_intermediate_size", model.moe.moe_intermediate_size, model.name)
        dense = getattr(model, "intermediate_size", None)
        if dense is not None:
            self._check_shard("intermediate_size", dense, model.name)

    def _check_shard(self, name: str, size: int, model_name: str) -> None:
        if size % self.tp or (size // self.tp) % FP8_BLOCK:
            raise UserError(
                f"tp={self.tp} must cut {name}={size} of {model_name} into multiples of "
                f"{FP8_BLOCK} (FP8 scaling blocks)"
            )


def stage_sizes(num_layers: int, pp: int, explicit: tuple[int, ...] | None = None) -> list[int]:
    """Number of layers of each pipeline stage.

    Without an explicit list the split is even, and each of the last stages takes one left-over
    layer, as in SGLang's ``get_pp_indices``.

    Raises:
        UserError: more stages than layers, or a list that does not add up.
    """
    if explicit is not None:
        if sum(explicit) != num_layers or min(explicit) < 1:
            raise UserError(
                f"stage sizes {','.join(map(str, explicit))} must each be at least 1 and add up "
                f"to {num_layers} layers"
            )
        return list(explicit)
    if pp > num_layers:
        raise UserError(f"pp={pp} stages need at least as many layers: the model has {num_layers}")
    base, remainder = divmod(num_layers, pp)
    return [base] * (pp - remainder) + [base + 1] * remainder
