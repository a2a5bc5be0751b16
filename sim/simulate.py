"""From a scenario and a machine to a predicted Timeline."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter

from runner.config.parallel import ParallelConfig
from runner.config.timeouts import HOST_TIMEOUT, TORCH_TIMEOUTS
from runner.config.warmup import WarmupPolicy
from runner.driver.run import record_parts
from runner.errors import UserError
from runner.planning.coverage import missing_kernels, nodes_coverage
from runner.planning.plan import table_of
from runner.planning.residency import kernels_at_start
from runner.scenario import Scenario
from runner.timeline import Span, Timeline, merge
from sim.costs.profile import Profile, slowed
from sim.costs.profile_costs import ProfileCosts
from sim.costs.start_up import StartPhases, start_phases
from sim.engine.engine import Engine, Outcome
from sim.engine.rank_program import ProgramCompiler
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

    @cached_property
    def costs(self) -> ProfileCosts:
        """How long operations take here."""
        profile = slowed(self.profile, self.host_factor)
        cores = self.cores_per_node or profile.cores_per_node
        return ProfileCosts(profile, profile.links[self.link], cores, self.ranks_per_gpu)

    def hosts_of(self, parallel: ParallelConfig) -> int:
        """Machines that a layout's nodes are on.

        Raises:
            UserError: the nodes do not fit them.
        """
        hosts = parallel.nodes if self.hosts is None else self.hosts
        if hosts < 1 or parallel.nodes % hosts:
            raise UserError(f"hosts={hosts} must divide the {parallel.nodes} nodes")
        return hosts


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
    parallel, costs = scenario.parallel, machine.costs
    hosts = machine.hosts_of(parallel)
    before = start_phases(
        machine.start, costs.profile.start_up, scenario.model, parallel, hosts, costs.ranks_per_gpu
    )
    outcome = _replay(scenario, machine, sum(seconds for _, seconds in before))
    spans = [*_phase_spans(before, parallel.world_size), *outcome.spans]
    timeline = Timeline(
        policy=scenario.policy.value,
        source="predicted",
        world_size=parallel.world_size,
        spans=tuple(sorted(spans, key=attrgetter("rank", "start"))),
        meta={
            **scenario.timeline_meta(),
            "hardware": costs.profile.name,
            "cores_per_node": costs.cores,
            "hosts": hosts,
            "host_factor": machine.host_factor,
            "link": machine.link,
            "ranks_per_gpu": costs.ranks_per_gpu,
            "coverage": nodes_coverage(scenario, outcome.disks),
            "coverage_up": nodes_coverage(scenario, outcome.up),
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


def with_walk_memory(scenario: Scenario, profile: Profile) -> Scenario:
    """The scenario with a limit to what walks take: what a server's cache leaves free on a GPU."""
    if scenario.walk_memory is not None:
        return scenario
    return replace(scenario, walk_memory=profile.gpu.memory * profile.start_up.graph_free)


def _replay(scenario: Scenario, machine: Machine, start: float) -> Outcome:
    """The run from ``start`` on, its spans merged."""
    parallel, costs, hosts = scenario.parallel, machine.costs, machine.hosts_of(scenario.parallel)
    folds = machine.fold and can_fold(parallel, hosts)
    nodes_per_host = parallel.nodes // hosts
    queues, timeout = costs.link.queues, machine.nccl_timeout
    compiler = ProgramCompiler(
        costs,
        table_of(scenario),
        locked=scenario.compile_lock,
        # A node's first rank walks alone under all policies but one.
        walkers_per_gpu=costs.ranks_per_gpu if scenario.policy is WarmupPolicy.RELAX else 1,
    )
    outcome = Engine(
        [compiler.program(parts) for parts in record_parts(scenario, folded=folds)],
        costs,
        node_of=[parallel.node_of(rank) for rank in range(parallel.world_size)],
        cores_per_node=max(1, costs.cores // nodes_per_host),
        host_of=[node // nodes_per_host for node in range(parallel.nodes)],
        timeout=TORCH_TIMEOUTS["nccl" if queues else "gloo"] if timeout is None else timeout,
        host_timeout=HOST_TIMEOUT,
        cached=kernels_at_start(scenario),
        run_ahead=queues if machine.run_ahead is None else machine.run_ahead,
        start=start,
    ).run()
    outcome = replace(outcome, spans=list(merge(outcome.spans)))
    return unfold(outcome, parallel) if folds else outcome


def _phase_spans(phases: list[tuple[str, float]], ranks: int) -> list[Span]:
    """The phases before the warm-up, one after the other, the same on every rank."""
    spans, start = [], 0.0
    for name, seconds in phases:
        for kind in ("phase", "setup"):
            spans += [Span(rank, start, start + seconds, kind, name) for rank in range(ranks)]
        start += seconds
    return spans
