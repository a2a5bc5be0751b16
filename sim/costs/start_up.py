"""What a server does before its warm-up: imports, process group, weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig
from runner.planning.weight_size import WeightSize, weight_size
from sim.costs.profile import StartUp


class Weights(Enum):
    """Where weights come from; ``dummy`` makes them up on the GPU, as ``launch`` does."""

    DISK = "disk"
    PAGE_CACHE = "page-cache"
    DUMMY = "dummy"


PHASES = ("imports", "process group", "weights")
"""Phases before the warm-up, in order."""


@dataclass(frozen=True)
class StartPhases:
    """Which of these phases a prediction has.

    Attributes:
        included: names out of :data:`PHASES`.
        weights: where weights come from.
    """

    included: tuple[str, ...] = PHASES
    weights: Weights = Weights.DISK


def start_phases(
    wanted: StartPhases,
    costs: StartUp,
    model: ModelConfig,
    parallel: ParallelConfig,
    hosts: int,
    ranks_per_gpu: int = 1,
) -> list[tuple[str, float]]:
    """Names and seconds of the phases, the slowest rank's.

    Ranks of a host read its disk side by side, those of a GPU take turns at making weights up.
    """
    ranks = parallel.world_size // hosts
    found = {
        "imports": costs.imports.of(ranks),
        "process group": costs.process_group.of(parallel.world_size),
    }
    if "weights" in wanted.included:
        found["weights"] = costs.weights.of(ranks) + _weight_seconds(
            wanted.weights, costs, model, parallel, ranks, ranks_per_gpu
        )
    return [(name, found[name]) for name in PHASES if name in wanted.included]


def made_elements(model: ModelConfig, parallel: ParallelConfig, ranks_per_gpu: int) -> int:
    """Elements of the made-up weights of the GPU that holds most, its ranks in a row."""
    return _most([size.shapes for size in _stage_sizes(model, parallel)], parallel, ranks_per_gpu)


@lru_cache(maxsize=256)
def _stage_sizes(model: ModelConfig, parallel: ParallelConfig) -> tuple[WeightSize, ...]:
    """Weights of a rank of each stage; counted once for all policies of a layout."""
    return tuple(
        weight_size(model, parallel, parallel.rank_of(stage, 0)) for stage in range(parallel.pp)
    )


def _weight_seconds(
    weights: Weights,
    costs: StartUp,
    model: ModelConfig,
    parallel: ParallelConfig,
    ranks: int,
    ranks_per_gpu: int,
) -> float:
    if weights is Weights.DUMMY:
        return made_elements(model, parallel, ranks_per_gpu) / costs.weights_made
    nbytes = [size.nbytes for size in _stage_sizes(model, parallel)]
    return _most(nbytes, parallel, ranks) / costs.weight_bandwidth[weights.value]


def _most(of_stage: Sequence[int], parallel: ParallelConfig, ranks: int) -> int:
    """Of ``ranks`` ranks in a row at a time, the largest sum of what each stage's ranks hold."""
    of_rank = [of_stage[parallel.coordinates(rank).pp_rank] for rank in range(parallel.world_size)]
    return max(
        sum(of_rank[first : first + ranks]) for first in range(0, parallel.world_size, ranks)
    )
