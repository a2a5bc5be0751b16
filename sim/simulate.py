"""From a scenario and a profile to a predicted Timeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runner.coverage import node_coverage
from runner.jit.kernels import Kernel
from runner.scenario import Scenario, record, run_meta
from runner.timeline import Timeline, merge
from runner.warmup import WarmupPolicy
from sim.engine import CollectiveTimeout, Engine, Outcome
from sim.profile import Profile, ProfileCosts


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a simulated run happens.

    Attributes:
        cores_per_node: CPU cores; None takes the profile's.
        link: name of one of the profile's links.
        ranks_per_gpu: ranks that share a GPU.
        nccl_timeout: longest wait in a collective, in seconds.
    """

    profile: Profile
    cores_per_node: int | None = None
    link: str = "nvlink"
    ranks_per_gpu: int = 1
    nccl_timeout: float = 600.0


def _coverage(scenario: Scenario, outcome: Outcome) -> list[dict[str, Any]]:
    """Every node's proof; nodes whose disks hold the same share one look."""
    proofs = {disk: node_coverage(0, scenario.plan, disk) for disk in set(outcome.disks.values())}
    return [{**proofs[outcome.disks[node]], "node": node} for node in sorted(outcome.disks)]


def _cached(scenario: Scenario) -> frozenset[Kernel]:
    """What every node's disk holds before the run: a cold cache, or the prebuilt one."""
    if scenario.warmup.policy is not WarmupPolicy.PREBUILT:
        return frozenset()
    return frozenset(item.kernel for item in scenario.plan.kernels)


@dataclass(frozen=True)
class Prediction:
    """A predicted Timeline and, where a wait passes the limit, the death it would be."""

    timeline: Timeline
    timeout: CollectiveTimeout | None


def simulate(scenario: Scenario, machine: Machine) -> Prediction:
    """Replay the scenario's schedule in virtual time.

    Raises:
        UserError: the model does not fit the layout.
    """
    parallel = scenario.parallel
    profile = machine.profile
    cores = machine.cores_per_node or profile.cores_per_node
    engine = Engine(
        record(scenario),
        ProfileCosts(profile, profile.links[machine.link], machine.ranks_per_gpu),
        node_of=[parallel.node_of(rank) for rank in range(parallel.world_size)],
        cores_per_node=cores,
        timeout=machine.nccl_timeout,
        cached=_cached(scenario),
    )
    outcome = engine.run()
    meta: dict[str, Any] = {
        **run_meta(scenario),
        "hardware": profile.name,
        "cores_per_node": cores,
        "link": machine.link,
        "ranks_per_gpu": machine.ranks_per_gpu,
        "coverage": _coverage(scenario, outcome),
    }
    timeline = Timeline(
        policy=scenario.warmup.policy.value,
        source="predicted",
        world_size=parallel.world_size,
        spans=merge(outcome.spans),
        meta=meta,
    )
    return Prediction(timeline, outcome.timeout)
