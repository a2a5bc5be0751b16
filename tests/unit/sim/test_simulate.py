"""simulate(): from a scenario and a machine to a prediction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from runner.config.warmup import WarmupPolicy
from runner.driver.run import record
from runner.errors import UserError
from runner.kernels.rules import kernels_of
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import KernelCall
from runner.planning.plan import plan_of
from runner.scenario import Scenario
from runner.schedule import Collective
from runner.timeline import FIRST_REQUEST
from sim.costs.profile_costs import compile_seconds
from sim.engine.engine import Engine
from sim.simulate import simulate
from tests.unit.tiny_runs import h200, machine, scenario

ALL = {"layers": 8, "batch_sizes": (64,)}


def test_context_parallel_ranks_split_attention_tokens_but_not_moe_tokens() -> None:
    ops = record(scenario(layers=8, pp=2, tp=2, attn_cp=2)).ranks[0]
    gathers = {op.name for op in ops if isinstance(op, Collective) and "gather" in op.name}
    assert gathers >= {"all_gather kv", "all_gather moe tokens", "all_gather compressor"}
    dense = {op.m for op in ops if isinstance(op, KernelCall) and op.type is T.GEMM_NT_F8F8BF16}
    assert {32, 64} <= dense, "attention sees half of 64 EXTEND tokens, the shared expert all"


def test_start_up_is_sum_of_stages_if_serial_and_longest_stage_if_parallel() -> None:
    one = scenario(pp=4, tp=1, nodes=4, **ALL)
    serial = simulate(one, machine()).timeline
    parallel = simulate(replace(one, policy=WarmupPolicy.PP_PARALLEL), machine()).timeline
    assert serial.kernels_compiled == parallel.kernels_compiled
    assert serial.compile_seconds == pytest.approx(parallel.compile_seconds)
    assert serial.wall > serial.compile_seconds
    longest = max(totals.compile for totals in parallel.totals())
    assert longest < parallel.wall < longest + 3.0


def test_ranks_of_one_node_share_compiled_kernels() -> None:
    shared = simulate(scenario(pp=4, tp=1, nodes=1, **ALL), machine()).timeline
    apart = simulate(scenario(pp=4, tp=1, nodes=4, **ALL), machine()).timeline
    assert shared.duplicates == 0
    assert apart.kernels_compiled > shared.kernels_compiled == apart.distinct_kernels


def test_exactly_the_kernels_of_the_schedule_are_compiled() -> None:
    one = scenario(WarmupPolicy.PP_PARALLEL, pp=2, tp=2, layers=8)
    needed = {
        kernel.identity
        for ops in record(one).ranks
        for op in ops
        if isinstance(op, KernelCall)
        for kernel in kernels_of(op)
    }
    timeline = simulate(one, machine()).timeline
    assert {span.key for span in timeline.spans if span.kind == "compile"} == needed


def test_wait_above_the_nccl_timeout_is_a_timeout() -> None:
    one = scenario(pp=4, tp=1, layers=8)
    lost = simulate(one, machine(nccl_timeout=5.0, run_ahead=False)).timeout
    assert lost is not None
    assert lost.rank > 0 and lost.operation == "recv hidden_states" and lost.needed > 5
    assert simulate(one, machine(nccl_timeout=lost.needed, run_ahead=False)).timeout is None
    assert simulate(one, machine(run_ahead=False)).longest_wait == lost.needed


# -- stalls and coverage --------------------------------------------------------------------------


def planned_identities(one: Scenario) -> set[str]:
    return {item.kernel.identity for item in plan_of(one).kernels}


@pytest.mark.parametrize("policy", [WarmupPolicy.PLANNED, WarmupPolicy.PREBUILT])
def test_planned_and_prebuilt_leave_no_stalls(policy: WarmupPolicy) -> None:
    one = scenario(policy, pp=2, tp=2, nodes=2)
    made = simulate(one, machine())
    assert (made.stalls, made.stall_seconds) == (0, 0.0)
    for name in ("coverage", "coverage_up"):
        proofs = made.timeline.meta[name]
        assert [proof["node"] for proof in proofs] == [0, 1]
        assert all(proof["present"] == proof["planned"] for proof in proofs)
        assert all(proof["stalls"] == [] for proof in proofs)
    compiled = {s.key for s in made.timeline.spans if s.is_kernel}
    assert compiled == (planned_identities(one) if policy is WarmupPolicy.PLANNED else set())


def test_stalls_are_planned_kernels_missing_when_the_server_is_up() -> None:
    """With one node, the server has exactly the kernels compiled before further requests."""
    one = scenario(WarmupPolicy.NONE, pp=1, tp=1)
    made = simulate(one, machine())
    up = made.timeline.end_of(FIRST_REQUEST)
    assert up == made.timeline.up and up is not None
    before = {s.key for s in made.timeline.spans if s.is_kernel and s.end <= up}
    after = {s.key for s in made.timeline.spans if s.is_kernel} - before
    assert after, "64 tokens need what 1 token did not"
    lacking = [i.kernel for i in plan_of(one).kernels if i.kernel.identity not in before]
    assert made.stalls == len(lacking)
    assert made.stall_seconds == pytest.approx(
        sum(compile_seconds(h200().compile, kernel) for kernel in lacking)
    )
    (up_proof,), (end_proof,) = (made.timeline.meta[n] for n in ("coverage_up", "coverage"))
    assert up_proof["planned"] - up_proof["present"] == len(lacking)
    assert end_proof["present"] == up_proof["present"] + len(after)


def test_kernel_missing_on_two_nodes_is_one_stall() -> None:
    one = scenario(WarmupPolicy.NONE, pp=1, tp=2)
    apart = scenario(WarmupPolicy.NONE, pp=1, tp=2, nodes=2)
    assert simulate(one, machine()).stalls == simulate(apart, machine()).stalls


# -- machines -------------------------------------------------------------------------------------


def test_timeline_metadata_describes_the_machine() -> None:
    meta = simulate(
        scenario(pp=2, tp=2, nodes=4),
        machine(hosts=2, cores_per_node=6, link="gloo", ranks_per_gpu=2),
    ).timeline.meta
    assert {
        name: meta[name]
        for name in ("hardware", "cores_per_node", "hosts", "link", "ranks_per_gpu", "nodes")
    } == {
        "hardware": "h200",
        "cores_per_node": 6,
        "hosts": 2,
        "link": "gloo",
        "ranks_per_gpu": 2,
        "nodes": 4,
    }


@pytest.mark.parametrize("hosts", [0, 3, -1])
def test_hosts_must_divide_the_nodes(hosts: int) -> None:
    with pytest.raises(UserError) as caught:
        simulate(scenario(pp=2, tp=2, nodes=4), machine(hosts=hosts))
    assert str(caught.value) == f"hosts={hosts} must divide the 4 nodes"


def test_nodes_of_one_host_share_its_cores() -> None:
    one = scenario(pp=1, tp=2, nodes=2)
    apart, together = (
        simulate(one, machine(hosts=hosts, cores_per_node=1)).timeline for hosts in (2, 1)
    )
    assert together.kernels_compiled == apart.kernels_compiled
    assert together.compile_seconds == pytest.approx(2 * apart.compile_seconds)


def test_hosts_run_ahead_by_default_if_the_link_queues() -> None:
    one = scenario(pp=2, tp=2)

    def wall(link: str, ahead: bool | None) -> float:
        return simulate(one, machine(link=link, run_ahead=ahead)).timeline.wall

    assert h200().links["nvlink"].queues and not h200().links["gloo"].queues
    for link, default in (("nvlink", True), ("gloo", False)):
        assert wall(link, None) == wall(link, default) != wall(link, not default)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """Collects the costs and settings of each Engine created."""
    made: list[tuple[Any, dict[str, Any]]] = []

    def engine(programs: Any, costs: Any, **settings: Any) -> Engine:
        made.append((costs, settings))
        return Engine(programs, costs, **settings)

    monkeypatch.setattr("sim.simulate.Engine", engine)
    return made


@pytest.mark.parametrize(
    ("link", "given", "limit"),
    [
        ("nvlink", None, 600.0),
        ("gloo", None, 1800.0),
        ("nvlink", 70.0, 70.0),
        ("gloo", 70.0, 70.0),
    ],
)
@pytest.mark.parametrize("ahead", [None, False, True])
def test_default_timeouts_are_those_of_the_link(
    engines: list[tuple[Any, dict[str, Any]]],
    link: str,
    given: float | None,
    limit: float,
    ahead: bool | None,
) -> None:
    """Timeouts do not depend on whether hosts run ahead."""
    simulate(scenario(tp=2, pp=1), machine(link=link, nccl_timeout=given, run_ahead=ahead))
    ((_, settings),) = engines
    assert (settings["timeout"], settings["host_timeout"]) == (limit, 7200.0)


@pytest.mark.parametrize(
    ("policy", "slower"), [(WarmupPolicy.RELAX, 2.0), (WarmupPolicy.FULL, 1.0)]
)
def test_walks_share_the_gpu_if_all_its_ranks_walk(policy: WarmupPolicy, slower: float) -> None:
    """With policy full only the first rank of a node walks."""
    slow = replace(h200(), gpu=replace(h200().gpu, memory_bandwidth=1e6))
    alone, shared = (
        simulate(scenario(policy, tp=2, pp=1), machine(profile=slow, ranks_per_gpu=ranks)).timeline
        for ranks in (1, 2)
    )
    walked = [
        sum(span.seconds for span in run.spans if span.name.startswith("walk "))
        for run in (alone, shared)
    ]
    assert walked[1] == pytest.approx(slower * walked[0], rel=0.05)


def test_walk_memory_limit_shortens_walks() -> None:
    values = {"walk_max_m": None, "max_tokens": 8192, "batch_sizes": (1,), "layers": 2}
    free, narrow = (
        simulate(scenario(WarmupPolicy.FULL, walk_memory=memory, **values), machine())
        for memory in (None, 1.0)
    )
    assert free.stalls < narrow.stalls
    assert free.timeline.up > narrow.timeline.up


def test_builders_of_one_host_divide_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def build(self: object, kernels: object, cores: int) -> list[object]:
        seen.append(cores)
        return []

    monkeypatch.setattr("sim.costs.profile_costs.ProfileCosts.build_spans", build)
    one = scenario(WarmupPolicy.PLANNED, pp=2, tp=2, nodes=4)
    for hosts, cores in ((4, 12), (2, 12), (1, 3)):
        simulate(one, machine(hosts=hosts, cores_per_node=cores))
    assert seen == [12] * 4 + [6] * 4 + [1] * 4


def test_compile_lock_avoids_duplicate_compiles() -> None:
    plain, locked = (
        simulate(scenario(pp=1, tp=2, compile_lock=lock), machine()).timeline
        for lock in (False, True)
    )
    assert plain.distinct_kernels == locked.distinct_kernels
    assert locked.duplicates < plain.duplicates == plain.distinct_kernels
    plain_waits, locked_waits = (
        {s.name for s in timeline.spans if s.kind == "wait"} for timeline in (plain, locked)
    )
    assert (plain_waits, locked_waits) == ({"GPU"}, {"GPU", "compile lock"})
