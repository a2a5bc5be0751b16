"""From a scenario and a machine to a predicted Timeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from runner.config.timeouts import HOST_TIMEOUT, TORCH_TIMEOUTS
from runner.config.warmup import WarmupPolicy
from runner.driver.run import record_parts
from runner.errors import UserError
from runner.kernels.kernel import Kernel
from runner.planning.coverage import missing_kernels, node_coverage, node_stages
from runner.planning.plan import table_of
from runner.planning.residency import kernels_at_start
from runner.scenario import Scenario
from runner.schedule import flatten
from runner.timeline import Span, Timeline, merge
from sim.costs.profile import Profile, slowed
from sim.costs.profile_costs import ProfileCosts
from sim.costs.start_up import StartPhases, start_phases
from sim.engine.engine import Engine, Outcome
from sim.engine.rank_program import Instruction, compile_program
from sim.engine.replica_folding import can_fold, unfold
from sim.engine.timeout_diagnosis import CollectiveTimeout


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a simulated run happens."""

    profile: Profile
    host_factor: float = 1.0  # how many times as long as the profile's its CPUs take
    cores_per_node: int | None = None  # CPU cores of a machine; None takes the profile's
    hosts: int | None = None  # machines that the nodes are on; None is one for each node
    link: str = "nvlink"  # one of the profile's
    ranks_per_gpu: int = 1
    nccl_timeout: float | None = None  # seconds in a collective; None is torch's for the link
    run_ahead: bool | None = None  # hosts queue communication and go on; None is as the link has it
    start: StartPhases = field(default_factory=lambda: StartPhases(()))  # before the warm-up
    fold: bool = True  # simulate replicas that behave alike once


@dataclass(frozen=True)
class Prediction:
    """A predicted run."""

    timeline: Timeline  # what happens if no wait is too long
    timeout: CollectiveTimeout | None  # the first wait beyond the limit, which would end the run
    longest_wait: float = 0.0  # seconds in a communication
    stalls: int = 0  # kernels that a forward can need and some node lacks once the server is up
    stall_seconds: float = 0.0  # to compile them one by one


def simulate(scenario: Scenario, machine: Machine) -> Prediction:
    """Replay the scenario's schedule in virtual time.

    Raises:
        UserError: the model does not fit the layout, or the nodes do not fit the hosts.
    """
    parallel = scenario.parallel
    hosts = parallel.nodes if machine.hosts is None else machine.hosts
    if hosts < 1 or parallel.nodes % hosts:
        raise UserError(f"hosts={hosts} must divide the {parallel.nodes} nodes")
    profile = slowed(machine.profile, machine.host_factor)
    shared = machine.ranks_per_gpu
    before = start_phases(machine.start, profile.start_up, scenario.model, parallel, hosts, shared)
    costs = ProfileCosts(
        profile,
        profile.links[machine.link],
        machine.cores_per_node or profile.cores_per_node,
        shared,
        # Otherwise a node's first rank walks alone.
        walkers_per_gpu=shared if scenario.policy is WarmupPolicy.RELAX else 1,
    )
    outcome = _replay(scenario, machine, costs, hosts, sum(seconds for _, seconds in before))
    spans = [*_phase_spans(before, parallel.world_size), *outcome.spans]
    timeline = Timeline(
        policy=scenario.policy.value,
        source="predicted",
        world_size=parallel.world_size,
        spans=tuple(sorted(spans, key=lambda span: (span.rank, span.start))),
        meta={
            **scenario.timeline_meta(),
            "hardware": profile.name,
            "cores_per_node": costs.cores,
            "hosts": hosts,
            "host_factor": machine.host_factor,
            "link": machine.link,
            "ranks_per_gpu": shared,
            "coverage": _coverage(scenario, outcome.disks),
            "coverage_up": _coverage(scenario, outcome.up),
        },
    )
    missing = missing_kernels(scenario, outcome.up)
    return Prediction(
        timeline,
        outcome.timeout,
        outcome.longest_wait,
        stalls=len(missing),
        stall_seconds=sum(map(costs.compile_seconds, missing)),
    )


def _replay(
    scenario: Scenario, machine: Machine, costs: ProfileCosts, hosts: int, start: float
) -> Outcome:
    """The run from ``start`` on, its spans merged."""
    parallel, link = scenario.parallel, costs.link
    folds = machine.fold and can_fold(parallel, hosts)
    nodes_per_host = parallel.nodes // hosts
    timeout = machine.nccl_timeout
    if timeout is None:
        timeout = TORCH_TIMEOUTS["nccl" if link.queues else "gloo"]
    outcome = Engine(
        _programs(scenario, costs, folds=folds),
        costs,
        node_of=[parallel.node_of(rank) for rank in range(parallel.world_size)],
        cores_per_node=max(1, costs.cores // nodes_per_host),
        host_of=[node // nodes_per_host for node in range(parallel.nodes)],
        timeout=timeout,
        host_timeout=HOST_TIMEOUT,
        cached=kernels_at_start(scenario),
        run_ahead=link.queues if machine.run_ahead is None else machine.run_ahead,
        start=start,
    ).run()
    outcome = replace(outcome, spans=list(merge(outcome.spans)))
    return unfold(outcome, parallel) if folds else outcome


def _programs(
    scenario: Scenario, costs: ProfileCosts, *, folds: bool
) -> list[Sequence[Instruction]]:
    table, locked = table_of(scenario), scenario.compile_lock
    return [
        compile_program(flatten(parts), costs, table, locked=locked)
        for parts in record_parts(scenario, folded=folds)
    ]


def _phase_spans(phases: list[tuple[str, float]], ranks: int) -> list[Span]:
    """The phases before the warm-up, one after the other, the same on every rank."""
    spans, start = [], 0.0
    for name, seconds in phases:
        for kind in ("phase", "setup"):
            spans += [Span(rank, start, start + seconds, kind, name) for rank in range(ranks)]
        start += seconds
    return spans


def _coverage(scenario: Scenario, disks: dict[int, frozenset[Kernel]]) -> list[dict[str, object]]:
    """Coverage of every node; found once for nodes of the same stages with the same disk."""
    parallel = scenario.parallel
    known: dict[object, dict[str, object]] = {}
    found = []
    for node, disk in sorted(disks.items()):
        key = (node_stages(parallel, node), disk)
        if key not in known:
            known[key] = node_coverage(scenario, node, disk)
        found.append({**known[key], "node": node})
    return found
