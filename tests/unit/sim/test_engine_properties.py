"""Properties of the simulation engine on random schedules."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from runner.kernels.rules import kernels_of
from runner.kernels.types import KernelCall
from runner.schedule import BARRIER, Collective, Mark, Op, Recv, Send, Walk
from runner.timeline import Timeline, merge
from sim.costs.profile_costs import Seconds
from sim.engine.engine import Outcome
from tests.unit.sim_rounds import RoundCosts, call, kernel_of, simulate, walk, work

RANKS = 4
KEYS = st.integers(1, 3)
RANK = st.integers(0, RANKS - 1)
STEP = st.one_of(
    st.tuples(st.just("work"), RANK, st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.just("call"), RANK, KEYS),
    st.tuples(st.just("walk"), RANK, KEYS),
    st.tuples(st.just("forward"), RANK),
    st.tuples(st.just("message"), RANK, RANK),
    st.tuples(st.just("collective"), st.sets(RANK, min_size=1)),
    st.tuples(st.just("barrier")),
)
COSTS = RoundCosts(kernel=Seconds(1.0, 2.0))


def ranks_of(steps: list[Any]) -> list[list[Op]]:
    """The operations of each rank; built in global order, so they cannot deadlock."""
    ranks: list[list[Op]] = [[] for _ in range(RANKS)]
    for kind, *words in steps:
        if kind == "work":
            ranks[words[0]].append(work(*words[1:]))
        elif kind == "call":
            ranks[words[0]].append(call(words[1]))
        elif kind == "walk":
            ranks[words[0]].append(walk(words[1], many=2))
        elif kind == "forward":
            ranks[words[0]].append(Mark("forward", "EXTEND 1"))
        elif kind == "message" and words[0] != words[1]:
            ranks[words[0]].append(Send("x", words[1], 8))
            ranks[words[1]].append(Recv("x", words[0], 8))
        elif kind == "collective":
            group = tuple(sorted(words[0]))
            for rank in group:
                ranks[rank].append(Collective("all_reduce x", group, 8))
        elif kind == "barrier":
            for ops in ranks:
                ops.append(Collective(BARRIER, tuple(range(RANKS)), 0))
    return ranks


SCHEDULES = st.lists(STEP, max_size=24).map(ranks_of)
NODES = st.lists(st.integers(0, 2), min_size=RANKS, max_size=RANKS)


def needed(ops: list[Op]) -> set[str]:
    found = {kernel for op in ops if isinstance(op, KernelCall) for kernel in kernels_of(op)}
    found |= {kernel_of(op.shape.k // 64) for op in ops if isinstance(op, Walk)}
    return {kernel.identity for kernel in found}


def compiled(outcome: Outcome, node_of: list[int]) -> Counter[tuple[int, str]]:
    return Counter((node_of[s.rank], s.key) for s in outcome.spans if s.kind == "compile")


@settings(max_examples=60, deadline=None)
@given(SCHEDULES, NODES, st.booleans(), st.booleans())
def test_every_needed_kernel_is_compiled_on_its_node(
    ranks: list[list[Op]], node_of: list[int], ahead: bool, locked: bool
) -> None:
    outcome = simulate(*ranks, node_of=node_of, run_ahead=ahead, compile_lock=locked, costs=COSTS)
    by_node: dict[int, set[str]] = {node: set() for node in node_of}
    for rank, ops in enumerate(ranks):
        by_node[node_of[rank]] |= needed(ops)
    done = compiled(outcome, node_of)
    assert set(done) == {(node, key) for node, keys in by_node.items() for key in keys}
    held = {node: {kernel.identity for kernel in disk} for node, disk in outcome.disks.items()}
    assert held == identities_when_up(outcome) == by_node
    if locked:
        # Each GEMM has one kernel, so the second rank finds it compiled.
        assert set(done.values()) <= {1}


def identities_when_up(outcome: Outcome) -> dict[int, set[str]]:
    return {node: {kernel.identity for kernel in disk} for node, disk in outcome.up.items()}


@settings(max_examples=60, deadline=None)
@given(SCHEDULES)
def test_running_ahead_never_ends_later_than_blocking(ranks: list[list[Op]]) -> None:
    """Ranks share no node: otherwise a rank that arrives earlier may have to compile.

    Forward marks are removed, because only a host that runs ahead waits there for its GPU.
    """
    ranks = [[op for op in ops if not isinstance(op, Mark)] for ops in ranks]
    apart = list(range(RANKS))
    blocking = simulate(*ranks, node_of=apart, costs=COSTS)
    ahead = simulate(*ranks, node_of=apart, costs=COSTS, run_ahead=True)
    assert all(a <= b + 1e-6 for a, b in zip(ahead.ends, blocking.ends, strict=True))


@settings(max_examples=60, deadline=None)
@given(SCHEDULES, NODES, st.booleans(), st.integers(1, 60))
def test_run_times_out_if_and_only_if_longest_wait_exceeds_limit(
    ranks: list[list[Op]], node_of: list[int], ahead: bool, limit: int
) -> None:
    outcome = simulate(*ranks, node_of=node_of, run_ahead=ahead, timeout=limit, costs=COSTS)
    assert (outcome.timeout is not None) == (outcome.longest_wait > limit)
    if outcome.timeout is not None:
        assert outcome.timeout.needed == outcome.longest_wait
        assert outcome.timeout.time >= limit


@settings(max_examples=60, deadline=None)
@given(SCHEDULES, NODES, st.booleans())
def test_start_time_shifts_all_spans(
    ranks: list[list[Op]], node_of: list[int], ahead: bool
) -> None:
    early = simulate(*ranks, node_of=node_of, run_ahead=ahead, costs=COSTS)
    late = simulate(*ranks, node_of=node_of, run_ahead=ahead, costs=COSTS, start=64.0)
    shifted = [(s.rank, s.start + 64, s.end + 64, s.kind, s.name, s.key) for s in early.spans]
    assert [(s.rank, s.start, s.end, s.kind, s.name, s.key) for s in late.spans] == shifted


@settings(max_examples=60, deadline=None)
@given(SCHEDULES, NODES, st.booleans(), st.booleans())
def test_spans_of_a_rank_never_overlap(
    ranks: list[list[Op]], node_of: list[int], ahead: bool, locked: bool
) -> None:
    """A host does one thing at a time; sending takes no time."""
    marked = [[Mark("phase", "warm-up"), *ops, Mark("phase", "end")] for ops in ranks]
    outcome = simulate(*marked, node_of=node_of, run_ahead=ahead, compile_lock=locked, costs=COSTS)
    for spans in (outcome.spans, merge(outcome.spans)):
        for rank in range(RANKS):
            taken = sorted(
                (s.start, s.end)
                for s in spans
                if s.rank == rank and s.kind != "phase" and s.seconds
            )
            for (_, end), (start, _) in pairwise(taken):
                assert start >= end - 1e-6
    timeline = Timeline("none", "predicted", RANKS, merge(outcome.spans))
    for totals, end in zip(timeline.totals(), outcome.ends, strict=True):
        busy = totals.compile + totals.load + totals.compute + totals.comm + totals.wait
        assert busy <= totals.total + 1e-6
        assert totals.total <= end + 1e-6


@settings(max_examples=60, deadline=None)
@given(SCHEDULES, st.integers(1, 60))
def test_hosts_limit_does_not_change_spans_and_is_independent(
    ranks: list[list[Op]], limit: int
) -> None:
    free = simulate(*ranks, run_ahead=True, costs=COSTS)
    lost = simulate(*ranks, run_ahead=True, host_timeout=limit, costs=COSTS)
    assert (lost.spans, lost.longest_wait) == (free.spans, free.longest_wait)
    if lost.timeout is not None:
        assert lost.timeout.of_hosts and lost.timeout.needed > limit
        enough = simulate(*ranks, run_ahead=True, host_timeout=lost.timeout.needed, costs=COSTS)
        assert enough.timeout is None


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(1, 4))
def test_shared_cores_bound_the_end_of_compiles(starts: list[int], cores: int) -> None:
    """Each rank starts a 10 s compile at its own time."""
    ranks = [[work(start), call(index + 1)] for index, start in enumerate(starts)]
    outcome = simulate(*ranks, costs=RoundCosts(cores=cores))
    compiles = [span for span in outcome.spans if span.kind == "compile"]
    assert sorted(span.start for span in compiles) == sorted(starts)
    assert all(span.seconds >= 10 - 1e-6 for span in compiles)
    last, total = max(span.end for span in compiles), 10 * len(starts)
    assert min(starts) + total / cores - 1e-6 <= last <= max(starts) + total + 1e-6
