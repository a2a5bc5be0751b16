"""Running a sweep: results of each case, CPU time, and worker processes."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from multiprocessing import active_children

import pytest

from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV4_TINY
from runner.errors import WorkFailedError
from runner.planning.plan import plan_of
from runner.scenario import Scenario
from runner.timeline import Span, Timeline
from sim.costs.profile import load_profile
from sim.machine import Machine
from sim.simulate import simulate
from sim.sweep import run as sweep
from sim.sweep.points import Result, Skipped
from sim.sweep.run import Case, Ended, cpu_seconds, run_cases, simulate_case
from tests.unit.sweeps import point


def case(policy: str = "none", *, cores: int = 2, timeout: float = 600.0, **layout: int) -> Case:
    layout = {"pp": 2, "tp": 1, "nodes": 2, **layout}
    at = point(policy, cores=cores, **layout)
    scenario = Scenario(
        model=DSV4_TINY,
        parallel=ParallelConfig(**layout),
        policy=at.policy,
        batch_sizes=(1,),
        max_tokens=64,
    )
    profile = load_profile("h200")
    machine = Machine(profile=profile, cores_per_node=cores, nccl_timeout=timeout, run_ahead=False)
    return Case(at, scenario, machine)


def test_result_has_the_figures_of_the_prediction() -> None:
    one = case("pp-parallel", tp=2)
    prediction = simulate(one.scenario, one.machine)
    timeline = prediction.timeline
    nodes = timeline.meta["coverage_up"]
    assert simulate_case(one) == Result(
        point=one.point,
        up_seconds=round(timeline.wall, 6),
        kernels_compiled=timeline.kernels_compiled,
        duplicates=timeline.duplicates,
        # Two ranks on two cores: no more compiles than cores, so spans are CPU time.
        cpu_seconds=round(timeline.compile_seconds, 6),
        present=min(node["present"] for node in nodes),
        planned=len(plan_of(one.scenario).kernels),
        timeout_seconds=None,
    )


@pytest.mark.parametrize("order", [1, -1])
def test_coverage_is_that_of_the_least_covered_node(
    order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = case()
    uneven = replace(one.scenario.parallel, stage_layers=(1, 7))
    one = replace(one, scenario=replace(one.scenario, parallel=uneven))
    prediction = simulate(one.scenario, one.machine)
    nodes = prediction.timeline.meta["coverage_up"]
    # Relative to what each node's stage needs: 13 of 24 is less covered than 10 of 18.
    assert [(node["present"], node["planned"]) for node in nodes] == [(10, 18), (13, 24)]
    meta = {**prediction.timeline.meta, "coverage_up": nodes[::order]}
    ordered = replace(prediction, timeline=replace(prediction.timeline, meta=meta))
    monkeypatch.setattr(sweep, "simulate", lambda scenario, machine: ordered)
    ended = simulate_case(one)
    assert isinstance(ended, Result) and (ended.present, ended.planned) == (13, 24)


def test_planned_covers_all_and_prebuilt_compiles_nothing() -> None:
    planned, prebuilt = simulate_case(case("planned")), simulate_case(case("prebuilt"))
    assert isinstance(planned, Result) and isinstance(prebuilt, Result)
    assert planned.coverage == prebuilt.coverage == 1
    assert (planned.kernels_compiled, planned.duplicates) == (planned.planned, 0)
    assert (prebuilt.kernels_compiled, prebuilt.cpu_seconds) == (0, 0.0)


def test_timeout_seconds_is_when_the_watchdog_ends_the_run() -> None:
    one = case(timeout=5.0)
    lost = simulate(one.scenario, one.machine).timeout
    ended = simulate_case(one)
    assert lost is not None and isinstance(ended, Result)
    assert ended.timeout_seconds == round(lost.time, 6)


def refused(one: Case) -> Case:
    return replace(one, machine=replace(one.machine, hosts=3))


def test_case_that_the_simulation_refuses_is_skipped() -> None:
    one = case()
    assert simulate_case(refused(one)) == Skipped(one.point, "hosts=3 must divide the 2 nodes")


# -- CPU time -------------------------------------------------------------------------------------


def timeline(
    *spans: tuple[int, float, float], nodes: tuple[int, ...] = (0, 0, 1), hosts: int = 2
) -> Timeline:
    return Timeline(
        policy="none",
        source="predicted",
        world_size=len(nodes),
        spans=tuple(Span(rank, start, end, "compile", "k", "k") for rank, start, end in spans),
        meta={"nodes": max(nodes) + 1, "hosts": hosts, "ranks": [{"node": node} for node in nodes]},
    )


def test_cpu_seconds_count_shared_cores_once() -> None:
    two = timeline((0, 0.0, 4.0), (1, 1.0, 3.0))
    assert cpu_seconds(two, cores=2) == 6.0
    assert cpu_seconds(two, cores=1) == 4.0


def test_cpu_seconds_of_separate_nodes_add_up() -> None:
    assert cpu_seconds(timeline((0, 0.0, 4.0), (2, 1.0, 3.0)), cores=1) == 6.0


def test_cpu_seconds_of_nodes_on_one_host_share_its_cores() -> None:
    spans = (0, 0.0, 4.0), (2, 1.0, 3.0)
    assert cpu_seconds(timeline(*spans, hosts=1), cores=1) == 4.0
    assert cpu_seconds(timeline(*spans, hosts=1), cores=2) == 6.0
    # Nodes 0 and 1 on one machine, 2 and 3 on the other.
    four = timeline((0, 0.0, 4.0), (1, 0.0, 4.0), (3, 0.0, 4.0), nodes=(0, 1, 2, 3))
    assert cpu_seconds(four, cores=1) == 8.0


def test_gaps_and_other_spans_use_no_cpu_time() -> None:
    idle = timeline((0, 0.0, 1.0), (0, 5.0, 7.0))
    assert cpu_seconds(idle, cores=4) == 3.0
    waiting = replace(idle, spans=(*idle.spans, Span(0, 1.0, 5.0, "wait", "w")))
    assert cpu_seconds(waiting, cores=4) == 3.0
    assert cpu_seconds(timeline(), cores=4) == 0.0


# -- processes ------------------------------------------------------------------------------------


def ended_of(cases: list[Case], jobs: int) -> list[Ended]:
    ended: list[Ended] = []
    run_cases(cases, jobs=jobs, on_end=ended.append)
    return ended


def test_several_processes_give_the_same_results_as_one() -> None:
    cases = [case(policy, cores=cores) for policy in ("none", "planned") for cores in (1, 2)]
    cases.append(refused(case(cores=4)))
    alone = ended_of(cases, 1)
    assert [item.point for item in alone] == [item.point for item in cases]
    assert isinstance(alone[-1], Skipped)
    spread = {item.point: item for item in ended_of(cases, 2)}
    assert [spread[item.point] for item in cases] == alone
    assert active_children() == []


def test_no_cases_give_no_results() -> None:
    assert ended_of([], 4) == []


def test_interruption_ends_the_processes() -> None:
    def stop(item: Ended) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cases([case(cores=cores) for cores in range(1, 9)], jobs=2, on_end=stop)
    assert active_children() == []


def _kill_itself(one: Case) -> Ended:
    os.kill(os.getpid(), signal.SIGKILL)
    return simulate_case(one)


def test_death_of_a_process_ends_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "simulate_case", _kill_itself)
    with pytest.raises(WorkFailedError, match="a process of the sweep died"):
        ended_of([case(), case(cores=4)], 2)


def test_processes_ignore_sigint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "simulate_case", _interrupt_itself)
    assert len(ended_of([case(), case(cores=4)], 2)) == 2


def _interrupt_itself(one: Case) -> Ended:
    os.kill(os.getpid(), signal.SIGINT)
    return simulate_case(one)
