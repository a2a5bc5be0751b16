"""Small dsv4-tiny scenarios and machines for simulator tests."""

from __future__ import annotations

from functools import cache
from typing import Any

from runner.config.hf import with_layers
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV4_TINY
from runner.config.warmup import WarmupPolicy
from runner.scenario import Scenario
from sim.costs.profile import Profile, load_profile
from sim.machine import Machine

LAYOUT = ("pp", "tp", "ep", "attn_cp", "replicas", "nodes", "stage_layers")
WARMUP = (
    "batch_sizes",
    "disaggregation",
    "speculative",
    "graph_batch_sizes",
    "walk_max_m",
    "compile_lock",
)


@cache
def h200() -> Profile:
    return load_profile("h200")


def machine(**changes: Any) -> Machine:
    return Machine(**{"profile": h200(), **changes})


def scenario(
    policy: WarmupPolicy = WarmupPolicy.NONE, *, layers: int = 4, **values: Any
) -> Scenario:
    """Requests of 1 and 64 tokens, at most 64 tokens per forward, M lists up to 64."""
    layout = {name: values.pop(name) for name in LAYOUT if name in values}
    warmup = {name: values.pop(name) for name in WARMUP if name in values}
    return Scenario(
        model=with_layers(DSV4_TINY, layers),
        parallel=ParallelConfig(**layout),
        policy=policy,
        **{"batch_sizes": (1, 64), "walk_max_m": 64, **warmup},
        **{"max_tokens": 64, **values},
    )
