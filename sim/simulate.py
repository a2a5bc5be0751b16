"""From a scenario and a machine to a predicted Timeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from runner.driver.warmup import WarmupPolicy
from runner.errors import UserError
from runner.kernels.kernel import Kernel
from runner.planning.coverage import node_coverage, node_stages
from runner.scenario import Role, Scenario, moved, record_roles, run_meta
from runner.timeline import Span, Timeline, merge
from sim.costs.profile import Link, Profile, slowed
from sim.costs.profile_costs import ProfileCosts
from sim.costs.start_up import StartPhases, start_phases
from sim.engine.engine import Engine, Outcome
from sim.engine.rank_program import Instruction, compile_program
from sim.engine.replica_folding import can_fold, unfold
from sim.engine.timeout_diagnosis import CollectiveTimeout


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a simulated run happens.

    Attributes:
        profile: what things cost.
        host_factor: how many times as long the CPUs take for everything as the profile's.
        cores_per_node: CPU cores of a machine; None takes the profile's.
        hosts: machines that the nodes are on; None is one for each node.
        link: name of one of the profile's links.
        ranks_per_gpu: ranks that share a GPU.
        nccl_timeout: longest wait in a collective, in seconds; None is torch's default of the link.
        run_ahead: whether hosts queue communication and go on; None is as the link has it.
        start: phases before the warm-up.
        fold: whether replicas that behave alike are simulated once.
    """

    profile: Profile
    host_factor: float = 1.0
    cores_per_node: int | None = None
    hosts: int | None = None
    link: str = "nvlink"
    ranks_per_gpu: int = 1
    nccl_timeout: float | None = None
    run_ahead: bool | None = None
    start: StartPhases = field(default_factory=lambda: StartPhases(()))
    fold: bool = True


@dataclass(frozen=True)
class Prediction:
    """A predicted Timeline.

    Attributes:
        timeline: what happens if nothing dies.
        timeout: where a wait passes the limit, the death it would be.
        longest_wait: seconds of the longest wait in a communication.
        stalls: kernels that a forward can still need once the server is up, and some node lacks.
        stall_seconds: seconds to compile them one by one.
    """

    timeline: Timeline
    timeout: CollectiveTimeout | None
    longest_wait: float = 0.0
    stalls: int = 0
    stall_seconds: float = 0.0


def simulate(scenario: Scenario, machine: Machine) -> Prediction:
    """Replay the scenario's schedule in virtual time.

    Raises:
        UserError: the model does not fit the layout, or the nodes do not fit the hosts.
    """
    parallel = scenario.parallel
    machine = replace(machine, profile=slowed(machine.profile, machine.host_factor))
    hosts = _hosts(machine, parallel.nodes)
    cores = machine.cores_per_node or machine.profile.cores_per_node
    before = start_phases(
        machine.start,
        machine.profile.start_up,
        scenario.model,
        parallel,
        hosts,
        machine.ranks_per_gpu,
    )
    folds = machine.fold and can_fold(parallel, hosts)
    outcome = _engine(scenario, machine, cores, hosts, folds=folds, start=_total(before)).run()
    outcome = replace(outcome, spans=list(merge(outcome.spans)))
    if folds:
        outcome = unfold(outcome, parallel)
    spans = (*_phase_spans(before, parallel.world_size), *outcome.spans)
    timeline = Timeline(
        policy=scenario.warmup.policy.value,
        source="predicted",
        world_size=parallel.world_size,
        spans=tuple(sorted(spans, key=lambda span: (span.rank, span.start))),
        meta={
            **run_meta(scenario),
            "hardware": machine.profile.name,
            "cores_per_node": cores,
            "hosts": hosts,
            "host_factor": machine.host_factor,
            "link": machine.link,
            "ranks_per_gpu": machine.ranks_per_gpu,
            "coverage": _coverage(scenario, outcome.disks),
            "coverage_up": _coverage(scenario, outcome.up),
        },
    )
    missing = _missing(scenario, outcome)
    costs = ProfileCosts(machine.profile, machine.profile.links[machine.link], cores)
    return Prediction(
        timeline,
        outcome.timeout,
        outcome.longest_wait,
        stalls=len(missing),
        stall_seconds=sum(map(costs.compile_seconds, missing)),
    )


def _missing(scenario: Scenario, outcome: Outcome) -> set[Kernel]:
    """Planned kernels that some node which can need them lacks once the server is up."""
    parallel, plan = scenario.parallel, scenario.plan
    return {
        item.kernel
        for stages, disk in {(node_stages(parallel, node), outcome.up[node]) for node in outcome.up}
        for item in plan.needed_by(stages)
        if item.kernel not in disk
    }


def _hosts(machine: Machine, nodes: int) -> int:
    hosts = nodes if machine.hosts is None else machine.hosts
    if hosts < 1 or nodes % hosts:
        raise UserError(f"hosts={hosts} must divide the {nodes} nodes")
    return hosts


def _engine(
    scenario: Scenario, machine: Machine, cores: int, hosts: int, *, folds: bool, start: float
) -> Engine:
    parallel, profile = scenario.parallel, machine.profile
    link = profile.links[machine.link]
    nodes_per_host = parallel.nodes // hosts
    every = scenario.warmup.policy is WarmupPolicy.RELAX
    costs = ProfileCosts(
        profile,
        link,
        cores,
        machine.ranks_per_gpu,
        walkers_per_gpu=machine.ranks_per_gpu if every else 1,
    )
    return Engine(
        _programs(scenario, costs, folds=folds),
        costs,
        node_of=[parallel.node_of(rank) for rank in range(parallel.world_size)],
        cores_per_node=max(1, cores // nodes_per_host),
        host_of=[node // nodes_per_host for node in range(parallel.nodes)],
        timeout=_limit(machine, link),
        host_timeout=_HOST_LIMIT,
        cached=_cached(scenario),
        run_ahead=link.queues if machine.run_ahead is None else machine.run_ahead,
        start=start,
    )


_HOST_LIMIT = 7200.0
"""Seconds that SGLang's host groups wait (0.5.23, ``parallel_state.py``)."""

_LIMITS = {True: 600.0, False: 1800.0}
"""Seconds that torch 2 lets a collective wait by default: NCCL, whose links queue, and gloo."""


def _limit(machine: Machine, link: Link) -> float:
    return _LIMITS[link.queues] if machine.nccl_timeout is None else machine.nccl_timeout


def _programs(
    scenario: Scenario, costs: ProfileCosts, *, folds: bool
) -> list[Sequence[Instruction]]:
    """Programs of all ranks; those of one role are compiled once."""
    compiled: dict[Role, list[Instruction]] = {}
    programs = []
    for rank, role in enumerate(record_roles(scenario, folded=folds)):
        if role not in compiled:
            lock = scenario.warmup.compile_lock
            compiled[role] = compile_program(role.ops, costs, scenario.table, locked=lock)
        programs.append(moved(role.first, compiled[role], scenario, rank))
    return programs


def _total(phases: list[tuple[str, float]]) -> float:
    return sum(seconds for _, seconds in phases)


def _phase_spans(phases: list[tuple[str, float]], ranks: int) -> list[Span]:
    """The phases before the warm-up, one after the other, the same on every rank."""
    spans, at = [], 0.0
    for name, seconds in phases:
        for kind in ("phase", "setup"):
            spans += [Span(rank, at, at + seconds, kind, name) for rank in range(ranks)]
        at += seconds
    return spans


def _coverage(scenario: Scenario, disks: dict[int, frozenset[Kernel]]) -> list[dict[str, Any]]:
    """Every node's proof; nodes of the same stages whose disks hold the same share one look."""
    parallel = scenario.parallel
    proofs: dict[Any, dict[str, Any]] = {}
    found = []
    for node, disk in sorted(disks.items()):
        key = (node_stages(parallel, node), disk)
        if key not in proofs:
            proofs[key] = node_coverage(node, parallel, scenario.plan, disk)
        found.append({**proofs[key], "node": node})
    return found


def _cached(scenario: Scenario) -> frozenset[Kernel]:
    """What every node's disk holds before the run: a cold cache, or the prebuilt one."""
    if scenario.warmup.policy is not WarmupPolicy.PREBUILT:
        return frozenset()
    return frozenset(item.kernel for item in scenario.plan.kernels)
