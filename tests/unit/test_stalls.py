"""Stalls predicted from a Schedule, against a replay of every call and the simulator."""

from __future__ import annotations

from collections import defaultdict
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.config.parallel import ParallelConfig
from runner.config.warmup import WarmupPolicy
from runner.driver.run import record
from runner.kernels.kernel import Kernel
from runner.kernels.rules import RULES, kernels_of
from runner.kernels.types import KernelCall, expand
from runner.planning.residency import (
    SERVING,
    Stall,
    kernels_at_start,
    kernels_once_up,
    stalls_of,
)
from runner.scenario import Scenario
from runner.schedule import (
    EXCHANGE,
    Collective,
    KernelWork,
    Mark,
    Op,
    Schedule,
    Walk,
)
from sim.engine.engine import Engine, Outcome
from sim.engine.rank_program import ProgramCompiler
from tests.unit.sim_rounds import RoundCosts, call, kernel_of, walk
from tests.unit.tiny_runs import scenario

A, B, C, D = (kernel_of(k) for k in (1, 2, 3, 4))
UP = Mark("phase", SERVING)
POLICIES = pytest.mark.parametrize("policy", WarmupPolicy, ids=lambda policy: policy.value)


def forward(name: str) -> Mark:
    return Mark("forward", name)


def stalls(*ranks: list[Op], nodes: int = 1) -> list[tuple[int, str, int, str]]:
    each = len(ranks) // nodes
    found = stalls_of(ranks, RULES, lambda rank: rank // each)
    return [(s.forward, s.name, s.node, s.kernel) for s in found]


def test_kernel_stalls_the_first_forward_that_needs_it() -> None:
    ops: list[Op] = [
        call(1),
        UP,
        forward("EXTEND 7"),
        call(1),
        call(2),
        forward("DECODE 7"),
        call(2),
        call(3),
        call(3),
    ]
    assert stalls(ops) == [(0, "EXTEND 7", 0, B.identity), (1, "DECODE 7", 0, C.identity)]


def test_nothing_stalls_before_the_server_is_up() -> None:
    ops: list[Op] = [
        Mark("phase", "warm-up"),
        forward("DECODE 1"),
        call(1),
        Mark("phase", "first request"),
        forward("EXTEND 1"),
        call(2),
    ]
    assert stalls(ops) == []
    assert stalls([*ops, UP]) == []
    assert stalls([*ops, UP, forward("EXTEND 9"), call(3)]) == [(0, "EXTEND 9", 0, C.identity)]


def test_compiles_after_the_requests_are_not_stalls() -> None:
    ops: list[Op] = [UP, forward("EXTEND 9"), call(1), Mark("phase", "end"), call(2)]
    assert stalls(ops) == [(0, "EXTEND 9", 0, A.identity)]


def test_stalls_are_counted_once_per_node() -> None:
    ops: list[Op] = [UP, forward("EXTEND 9"), call(1)]
    assert stalls(ops, ops) == [(0, "EXTEND 9", 0, A.identity)]
    assert stalls(ops, ops, nodes=2) == [
        (0, "EXTEND 9", 0, A.identity),
        (0, "EXTEND 9", 1, A.identity),
    ]
    # A kernel that any rank of the node used before the requests is on the node's disk.
    assert stalls([call(1), UP, forward("EXTEND 9")], ops) == []


def test_walk_during_requests_stalls_on_all_its_kernels() -> None:
    ops: list[Op] = [UP, forward("EXTEND 9"), walk(2), call(1), walk(2)]
    assert stalls(ops) == sorted((0, "EXTEND 9", 0, kernel.identity) for kernel in (A, B))


def test_kernels_once_up_include_built_exchanged_and_walked_ones() -> None:
    exchange = Collective(EXCHANGE, (0, 1), 0)
    first: list[Op] = [KernelWork("build", (A,)), exchange, call(2), UP, call(4)]
    second: list[Op] = [KernelWork("build", (C,)), exchange, UP, call(4)]
    made = [first, second, [walk(4), UP]]
    assert kernels_once_up(made, RULES, lambda rank: rank) == {0: {A, B, C}, 1: {A, B, C}, 2: {D}}
    one_node = kernels_once_up(made, RULES, lambda rank: 0)
    assert one_node == {0: {A, B, C, D}}


def test_ranks_may_serve_different_numbers_of_forwards() -> None:
    one: list[Op] = [UP, forward("EXTEND 9"), call(1), forward("DECODE 9"), call(2)]
    assert stalls(one, [UP, forward("EXTEND 9"), call(1)], []) == [
        (0, "EXTEND 9", 0, A.identity),
        (1, "DECODE 9", 0, B.identity),
    ]


def test_kernels_present_at_start_do_not_stall() -> None:
    ranks = [[UP, forward("EXTEND 9"), call(1), call(2)]]
    found = stalls_of(ranks, RULES, int, frozenset({A}))
    assert [stall.kernel for stall in found] == [B.identity]


# -- whole runs -----------------------------------------------------------------------------------


@cache
def run(policy: WarmupPolicy, stream: tuple[int, ...], nodes: int = 2) -> tuple[Scenario, Schedule]:
    one = scenario(policy, pp=2, tp=2, nodes=nodes, stream=stream, max_tokens=128, walk_max_m=16)
    return one, record(one)


def used(op: Op) -> tuple[Kernel, ...]:
    """Kernels of an operation; for a walk, of each of its calls."""
    if isinstance(op, KernelCall):
        return kernels_of(op)
    if isinstance(op, Walk):
        return tuple(k for m in expand(op.steps) for k in kernels_of(op.shape.call(m)))
    return op.kernels if isinstance(op, KernelWork) else ()


def replayed(
    made: Schedule, parallel: ParallelConfig
) -> tuple[dict[int, set[Kernel]], list[Stall]]:
    """Kernels each node holds when up, and its stalls, from a replay of every call."""
    held: dict[int, set[Kernel]] = defaultdict(set)
    exchanged = False
    later: dict[int, list[tuple[int, str, int, Kernel]]] = defaultdict(list)
    for rank, ops in enumerate(made.ranks):
        index, name, up = -1, "", False
        for op in ops:
            up = up or op == UP
            if up and isinstance(op, Mark) and op.kind == "forward":
                index, name = index + 1, op.name
            exchanged = exchanged or (isinstance(op, Collective) and op.name == EXCHANGE)
            for kernel in used(op):
                if up:
                    later[index].append((index, name, parallel.node_of(rank), kernel))
                else:
                    held[parallel.node_of(rank)].add(kernel)
    if exchanged:
        everything = set().union(*held.values())
        held = defaultdict(set, {node: set(everything) for node in held})
    has = {node: set(kernels) for node, kernels in held.items()}
    found = []
    for index in sorted(later):
        for at, name, node, kernel in later[index]:
            if kernel not in has[node]:
                has[node].add(kernel)
                found.append(Stall(at, name, node, kernel.identity))
    return dict(held), sorted(found)


@POLICIES
def test_stalls_equal_those_of_a_replay(policy: WarmupPolicy) -> None:
    for nodes in (1, 2, 4):
        one, made = run(policy, (7, 100, 3, 64), nodes)
        held, expected = replayed(made, one.parallel)
        assert (
            kernels_once_up(made.ranks, RULES, one.parallel.node_of, kernels_at_start(one)) == held
        )
        assert stalls_of(made.ranks, RULES, one.parallel.node_of, kernels_at_start(one)) == expected
        planning = policy in (WarmupPolicy.PLANNED, WarmupPolicy.PREBUILT)
        assert (expected == []) == planning


def simulated(one: Scenario, made: Schedule) -> Outcome:
    costs = RoundCosts()
    return Engine(
        [ProgramCompiler(costs, RULES).program(ops) for ops in made.ranks],
        costs,
        node_of=[one.parallel.node_of(rank) for rank in range(4)],
        cores_per_node=4,
        cached=kernels_at_start(one),
    ).run()


@POLICIES
def test_simulator_compiles_the_predicted_stalls(policy: WarmupPolicy) -> None:
    """What the simulator compiles once the server is up equals the prediction from the Schedule."""
    one, made = run(policy, (7, 100, 3, 64))
    outcome = simulated(one, made)
    assert outcome.up == kernels_once_up(
        made.ranks, RULES, one.parallel.node_of, kernels_at_start(one)
    )
    later = {
        (node, kernel.identity)
        for node in outcome.up
        for kernel in outcome.disks[node] - outcome.up[node]
    }
    assert later == {
        (s.node, s.kernel)
        for s in stalls_of(made.ranks, RULES, one.parallel.node_of, kernels_at_start(one))
    }


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([WarmupPolicy.NONE, WarmupPolicy.FAST, WarmupPolicy.RELAX]),
    st.lists(st.integers(1, 128), max_size=3).map(tuple),
)
def test_kernels_once_up_and_stalls_cover_the_stream_exactly(
    policy: WarmupPolicy, stream: tuple[int, ...]
) -> None:
    one, made = run(policy, stream)
    node_of = one.parallel.node_of
    covered = {
        node: {kernel.identity for kernel in kernels}
        for node, kernels in kernels_once_up(made.ranks, RULES, node_of).items()
    }
    found = stalls_of(made.ranks, RULES, node_of)
    pairs = [(stall.node, stall.kernel) for stall in found]
    assert len(pairs) == len(set(pairs)), "a kernel stalls a node only once"
    assert all(kernel not in covered[node] for node, kernel in pairs)
    needed: dict[int, set[str]] = defaultdict(set)
    for rank, ops in enumerate(made.ranks):
        after = ops[ops.index(UP) :] if UP in ops else ()
        for op in after:
            needed[node_of(rank)] |= {kernel.identity for kernel in used(op)}
    for node, kernels in needed.items():
        stalled = {kernel for at, kernel in pairs if at == node}
        assert kernels <= covered[node] | stalled
        assert stalled <= kernels
