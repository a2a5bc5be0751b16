"""Predict the Timeline of a scenario on a machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter

from runner.config.timeouts import HOST_TIMEOUT, TORCH_TIMEOUTS
from runner.config.warmup import WarmupPolicy
from runner.driver.run import record_parts
from runner.errors import UserError
from runner.planning.coverage import missing_kernels, nodes_coverage
from runner.planning.plan import table_of
from runner.planning.residency import kernels_at_start
from runner.scenario import Scenario
from runner.timeline import Span, Timeline, merge
from sim.costs.start_up import start_phases
from sim.engine.engine import Engine, Outcome
from sim.engine.rank_program import ProgramCompiler
from sim.engine.replica_folding import can_fold, unfold
from sim.engine.timeout_diagnosis import CollectiveTimeout
from sim.machine import Machine


@dataclass(frozen=True)
class Prediction:
    """A predicted run."""

    timeline: Timeline  # what happens if no wait is too long
    timeout: CollectiveTimeout | None  # the first wait beyond the limit, which would end the run
    longest_wait: float = 0.0  # seconds in a communication
    stalls: int = 0  # kernels that some node can need but lacks once the server is up
    stall_seconds: float = 0.0  # to compile them one by one


def simulate(scenario: Scenario, machine: Machine) -> Prediction:
    """Replay the scenario's schedule in virtual time.

    Raises:
        UserError: the model does not fit the layout, the nodes do not fit the hosts, or the
            kernels are for a GPU with another number of SMs than the machine's.
    """
    parallel, costs = scenario.parallel, machine.costs
    if scenario.num_sms != costs.profile.num_sms:
        raise UserError(
            f"kernels for {scenario.num_sms} SMs cannot be timed with profile "
            f"{costs.profile.name}, a GPU with {costs.profile.num_sms}: choose both for one GPU"
        )
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


def _replay(scenario: Scenario, machine: Machine, start: float) -> Outcome:
    """The run from ``start`` on, with merged spans."""
    parallel, costs, hosts = scenario.parallel, machine.costs, machine.hosts_of(scenario.parallel)
    folds = machine.fold and can_fold(parallel, hosts)
    nodes_per_host = parallel.nodes // hosts
    queues, timeout = costs.link.queues, machine.nccl_timeout
    compiler = ProgramCompiler(
        costs,
        table_of(scenario),
        locked=scenario.compile_lock,
        # Under all policies but one, only a node's first rank walks.
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
    """Spans of the consecutive phases before the warm-up, equal on every rank."""
    spans, start = [], 0.0
    for name, seconds in phases:
        for kind in ("phase", "setup"):
            spans += [Span(rank, start, start + seconds, kind, name) for rank in range(ranks)]
        start += seconds
    return spans
