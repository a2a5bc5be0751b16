"""Cost of what a server does before its warm-up: imports, process group, weights."""

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
    """Where weights come from; ``dummy`` ones are made up on the GPU, as ``launch`` does."""

    DISK = "disk"
    PAGE_CACHE = "page-cache"
    DUMMY = "dummy"


PHASES = ("imports", "process group", "weights")
"""Phases before the warm-up, in order."""


@dataclass(frozen=True)
class StartPhases:
    """Which phases (of :data:`PHASES`) a prediction includes, and where weights come from."""

    included: tuple[str, ...] = PHASES
    weights: Weights = Weights.DISK


def start_phases(
    phases: StartPhases,
    costs: StartUp,
    model: ModelConfig,
    parallel: ParallelConfig,
    hosts: int,
    ranks_per_gpu: int = 1,
) -> list[tuple[str, float]]:
    """Names and seconds of the phases, for the slowest rank.

    Ranks on a host share its disk bandwidth; ranks on a GPU make up weights one after the other.
    """
    ranks = parallel.world_size // hosts
    seconds = {
        "imports": costs.imports.of(ranks),
        "process group": costs.process_group.of(parallel.world_size),
    }
    if "weights" in phases.included:
        if phases.weights is Weights.DUMMY:
            loading = made_elements(model, parallel, ranks_per_gpu) / costs.weights_made
        else:
            nbytes = [size.nbytes for size in _stage_sizes(model, parallel)]
            bandwidth = costs.weight_bandwidth[phases.weights.value]
            loading = _largest_sum(nbytes, parallel, ranks) / bandwidth
        seconds["weights"] = costs.weights.of(ranks) + loading
    return [(name, seconds[name]) for name in PHASES if name in phases.included]


def made_elements(model: ModelConfig, parallel: ParallelConfig, ranks_per_gpu: int) -> int:
    """Elements of dummy weights on the GPU that makes up the most."""
    elements = [size.shapes for size in _stage_sizes(model, parallel)]
    return _largest_sum(elements, parallel, ranks_per_gpu)


@lru_cache(maxsize=256)
def _stage_sizes(model: ModelConfig, parallel: ParallelConfig) -> tuple[WeightSize, ...]:
    """Weights of one rank per stage; counted once for all policies of a layout."""
    return tuple(
        weight_size(model, parallel, parallel.rank_of(stage, 0)) for stage in range(parallel.pp)
    )


def _largest_sum(by_stage: Sequence[int], parallel: ParallelConfig, ranks: int) -> int:
    """Largest sum of the stages' values over ``ranks`` consecutive ranks of a host or GPU."""
    by_rank = [by_stage[parallel.coordinates(rank).pp_rank] for rank in range(parallel.world_size)]
    return max(
        sum(by_rank[first : first + ranks]) for first in range(0, parallel.world_size, ranks)
    )
