"""What a server does before its warm-up: imports, process group, weights."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig
from runner.weight_size import weight_size
from sim.profile import StartUp


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
    wanted: StartPhases, costs: StartUp, model: ModelConfig, parallel: ParallelConfig, hosts: int
) -> list[tuple[str, float]]:
    """Names and seconds of the phases, the slowest rank's.

    Ranks of a host read its disk side by side; made-up weights each rank makes on its own.
    """
    ranks = parallel.world_size // hosts
    found = {
        "imports": costs.imports.of(ranks),
        "process group": costs.process_group.of(parallel.world_size),
    }
    if "weights" in wanted.included:
        found["weights"] = costs.weights.of(ranks) + _weight_seconds(
            wanted.weights, costs, model, parallel, ranks
        )
    return [(name, found[name]) for name in PHASES if name in wanted.included]


def largest_rank_bytes(model: ModelConfig, parallel: ParallelConfig) -> float:
    """Bytes of the weights of the rank that holds most."""
    return max(_stage_bytes(model, parallel))


@lru_cache(maxsize=256)
def _stage_bytes(model: ModelConfig, parallel: ParallelConfig) -> tuple[float, ...]:
    """Bytes of the weights of a rank of each stage; counted once for all policies of a layout."""
    return tuple(
        weight_size(model, parallel, parallel.rank_of(stage, 0)).nbytes
        for stage in range(parallel.pp)
    )


def _weight_seconds(
    weights: Weights, costs: StartUp, model: ModelConfig, parallel: ParallelConfig, ranks: int
) -> float:
    bandwidth = costs.weight_bandwidth[weights.value]
    if weights is Weights.DUMMY:
        return largest_rank_bytes(model, parallel) / bandwidth
    sizes = _stage_bytes(model, parallel)
    of_rank = [sizes[parallel.coordinates(rank).pp_rank] for rank in range(parallel.world_size)]
    hosts = range(0, parallel.world_size, ranks)
    return max(sum(of_rank[first : first + ranks]) for first in hosts) / bandwidth
