"""Simulated hosts that queue communication and run ahead of their GPUs, as with NCCL."""

from __future__ import annotations

import pytest

from runner.schedule import BARRIER, EXCHANGE, Collective, KernelWork, Mark, Op, Recv, Send
from runner.timeline import Span
from sim.costs.profile_costs import Seconds
from sim.engine.timeout_diagnosis import CollectiveTimeout
from tests.unit.sim_rounds import RoundCosts, call, kernel_of, rows, simulate, walk, work

BOTH = Collective("all_reduce x", (0, 1), 8)
FORWARD = Mark("forward", "EXTEND 1")


def test_host_compiles_while_its_gpu_waits() -> None:
    first: list[Op] = [BOTH, call(1)]
    second: list[Op] = [work(20), BOTH]
    blocking = simulate(first, second)
    assert rows(blocking, 0) == [
        ("wait", 0, 20),
        ("comm", 20, 23),
        ("compile", 23, 33),
        ("load", 33, 34),
        ("compute", 34, 36),
    ]
    ahead = simulate(first, second, run_ahead=True)
    # The host waits only at its end, until the collective is done at 23.
    assert rows(ahead, 0) == [
        ("compile", 0, 10),
        ("load", 10, 11),
        ("compute", 11, 13),
        ("wait", 13, 23),
    ]
    assert [s for s in ahead.spans if s.kind in ("wait", "comm")] == [
        Span(0, 13, 23, "wait", "GPU"),
        Span(1, 20, 23, "wait", "GPU"),
    ]
    assert (blocking.ends, ahead.ends) == ((36.0, 23.0), (23.0, 23.0))


def test_gpu_runs_queued_work_in_order() -> None:
    # Host: queued at 0, run at 1; GPU: the collective until 8, then 4 s.
    ahead = simulate([BOTH, work(1, 4), BOTH], [work(5), BOTH, BOTH], run_ahead=True)
    assert ahead.ends == (15.0, 15.0)
    # The second collective starts at 12; both hosts wait for its end only.
    assert rows(ahead, 0) == [("compute", 0, 1), ("wait", 1, 15)]
    assert rows(ahead, 1) == [("compute", 0, 5), ("wait", 5, 15)]


def test_wait_of_queued_collective_counts_from_queueing() -> None:
    """Rank 0 waits for the second collective from 13 if blocking, from 1 if it only queues it."""
    first: list[Op] = [BOTH, work(1), BOTH]
    second: list[Op] = [work(9), BOTH, work(11), BOTH]
    assert simulate(first, second).longest_wait == 10.0
    ahead = simulate(first, second, run_ahead=True)
    assert ahead.longest_wait == 19.0
    lost = simulate(first, second, run_ahead=True, timeout=15.0).timeout
    assert lost is not None
    assert (lost.time, lost.rank, lost.waiting_for, lost.needed) == (16.0, 0, 1, 19.0)
    assert lost.busy_with == "compute compute"
    assert simulate(first, second, run_ahead=True, timeout=19.0).timeout is None


def test_receive_always_blocks_the_host() -> None:
    outcome = simulate([work(6), Send("x", 1, 1)], [Recv("x", 0, 1), call(1)], run_ahead=True)
    assert rows(outcome, 1) == [
        ("wait", 0, 6),
        ("comm", 6, 10),
        ("compile", 10, 20),
        ("load", 20, 21),
        ("compute", 21, 23),
    ]


def test_receive_waits_for_queued_work_first() -> None:
    outcome = simulate(
        [work(9), BOTH, work(11), Send("x", 1, 1)], [BOTH, Recv("x", 0, 1)], run_ahead=True
    )
    # Rank 0's host sends at 20; its GPU's collective ended at 12.
    assert rows(outcome, 1) == [("wait", 0, 12), ("wait", 12, 20), ("comm", 20, 24)]
    assert [s.name for s in outcome.spans if s.rank == 1] == ["GPU", "recv x"]


# -- limits ---------------------------------------------------------------------------------------


def test_receive_is_subject_to_the_hosts_limit() -> None:
    """A server is told about messages over gloo, which has its own limit."""
    ranks: tuple[list[Op], list[Op]] = ([work(60), Send("x", 1, 1)], [Recv("x", 0, 1)])
    ahead = simulate(*ranks, run_ahead=True, timeout=5.0)
    assert (ahead.timeout, ahead.longest_wait) == (None, 0.0)
    assert simulate(*ranks, run_ahead=True, timeout=5.0, host_timeout=60.0).timeout is None
    lost = simulate(*ranks, run_ahead=True, timeout=5.0, host_timeout=50.0)
    assert lost.timeout == CollectiveTimeout(
        50.0, 1, "recv x", 0, "compute compute", 60.0, of_hosts=True
    )
    assert lost.longest_wait == 0.0


def test_blocking_hosts_have_only_the_collective_limit() -> None:
    ranks: tuple[list[Op], list[Op]] = ([work(60), Send("x", 1, 1)], [Recv("x", 0, 1)])
    assert simulate(*ranks, host_timeout=5.0).timeout is None
    blocking = simulate(*ranks, timeout=5.0, host_timeout=1.0)
    assert blocking.timeout == CollectiveTimeout(5.0, 1, "recv x", 0, "compute compute", 60.0)
    assert blocking.longest_wait == 60.0


@pytest.mark.parametrize("name", [EXCHANGE, BARRIER])
def test_kernel_exchange_and_barrier_are_subject_to_the_hosts_limit(name: str) -> None:
    ranks = [[Collective(name, (0, 1), 0)], [work(30), Collective(name, (0, 1), 0)]]
    ahead = simulate(*ranks, run_ahead=True, timeout=5.0, host_timeout=20.0)
    assert ahead.timeout == CollectiveTimeout(
        20.0, 0, name, 1, "compute compute", 30.0, of_hosts=True
    )
    assert ahead.longest_wait == 0.0
    assert simulate(*ranks, run_ahead=True, timeout=5.0, host_timeout=30.0).timeout is None
    blocking = simulate(*ranks, timeout=5.0, host_timeout=20.0)
    assert blocking.timeout == CollectiveTimeout(5.0, 0, name, 1, "compute compute", 30.0)


def test_needed_limit_is_for_the_limit_that_was_exceeded() -> None:
    """Rank 1's GPU waits from 0 to 9; its host waits from 12 for a message sent at 69."""
    ranks: tuple[list[Op], list[Op]] = (
        [work(9), BOTH, work(60), Send("x", 1, 1)],
        [BOTH, Recv("x", 0, 1)],
    )
    of_gpus = simulate(*ranks, run_ahead=True, timeout=5.0, host_timeout=20.0)
    assert of_gpus.timeout == CollectiveTimeout(5.0, 1, BOTH.name, 0, "compute compute", 9.0)
    of_hosts = simulate(*ranks, run_ahead=True, timeout=9.0, host_timeout=20.0)
    assert of_hosts.timeout == CollectiveTimeout(
        32.0, 1, "recv x", 0, "compute compute", 57.0, of_hosts=True
    )
    assert of_gpus.longest_wait == of_hosts.longest_wait == 9.0


def test_timeout_blames_the_busy_rank_behind_queued_collectives() -> None:
    """Rank 0 waits for 1, whose host is done but whose GPU waits for 2, which is computing."""
    late = Collective("all_reduce y", (1, 2), 8)
    outcome = simulate([BOTH], [work(1), late, BOTH], [work(50), late], run_ahead=True, timeout=20)
    assert not [s for s in outcome.spans if s.kind == "comm"]
    # Rank 1's GPU joins rank 0's collective at 53.
    assert outcome.timeout == CollectiveTimeout(20.0, 0, BOTH.name, 2, "compute compute", 53.0)


# -- where hosts wait -----------------------------------------------------------------------------


def test_message_is_sent_when_the_gpu_reaches_it() -> None:
    outcome = simulate([work(1, 6), Send("x", 1, 1), call(1)], [Recv("x", 0, 1)], run_ahead=True)
    # The host compiles from 1 on; the message arrives 4 s after the GPU's work ends at 6.
    assert [row for row in rows(outcome, 0) if row[0] == "compile"] == [("compile", 1, 11)]
    assert rows(outcome, 1) == [("wait", 0, 6), ("comm", 6, 10)]


def test_kernel_exchange_blocks_the_host() -> None:
    exchange = Collective(EXCHANGE, (0, 1), 0)
    first: list[Op] = [KernelWork("build", (kernel_of(1),)), exchange, call(2)]
    second: list[Op] = [KernelWork("build", (kernel_of(2),)), work(4), exchange, call(1)]
    outcome = simulate(first, second, node_of=[0, 1], run_ahead=True)
    assert rows(outcome, 0) == [
        ("compile", 0, 5),
        ("wait", 5, 9),
        ("comm", 9, 12),
        ("load", 12, 13),
        ("compute", 13, 15),
    ]


@pytest.mark.parametrize("ahead", [False, True])
def test_barrier_blocks_the_host_and_shares_no_kernels(ahead: bool) -> None:
    barrier = Collective(BARRIER, (0, 1), 0)
    few, many = (tuple(map(kernel_of, range(1, n + 1))) for n in (2, 6))
    first: list[Op] = [KernelWork("verify", few), barrier, KernelWork("load", few[:1])]
    second: list[Op] = [KernelWork("verify", many), barrier, call(9)]
    outcome = simulate(first, second, node_of=[0, 1], run_ahead=ahead, cached=frozenset(many))
    # Verifying takes 0.5 s a kernel; then the barrier takes 3 s.
    assert rows(outcome, 0) == [("load", 0, 1), ("wait", 1, 3), ("comm", 3, 6), ("load", 6, 7)]
    assert rows(outcome, 1) == [
        ("load", 0, 3),
        ("comm", 3, 6),
        ("compile", 6, 16),
        ("load", 16, 17),
        ("compute", 17, 19),
    ]
    assert outcome.disks == {0: frozenset(many), 1: frozenset(many) | {kernel_of(9)}}
    assert outcome.up == outcome.disks


@pytest.mark.parametrize("ahead", [False, True])
def test_walk_starts_when_the_gpu_is_idle(ahead: bool) -> None:
    outcome = simulate([work(1, 9), walk(1)], run_ahead=ahead)
    assert rows(outcome, 0) == [
        ("compute", 0, 9),
        ("load", 9, 11),
        ("compile", 11, 21),
        ("load", 21, 22),
        ("load", 22, 22.5),
    ]


def test_walk_waits_for_queued_work() -> None:
    outcome = simulate([BOTH, work(1), walk(1)], [work(20), BOTH], run_ahead=True)
    assert rows(outcome, 0) == [
        ("compute", 0, 1),
        ("wait", 1, 23),
        ("load", 23, 25),
        ("compile", 25, 35),
        ("load", 35, 36),
        ("load", 36, 36.5),
    ]


def test_forward_starts_when_the_gpu_is_idle() -> None:
    ops: list[Op] = [BOTH, FORWARD, call(1)]
    second: list[Op] = [work(20), BOTH]
    ahead = simulate(ops, second, run_ahead=True)
    assert [row for row in rows(ahead, 0) if row[0] == "compile"] == [("compile", 23, 33)]
    only_gpu = simulate([work(1, 9), FORWARD, call(1)], run_ahead=True)
    assert [row for row in rows(only_gpu, 0) if row[0] == "compile"] == [("compile", 9, 19)]


def test_forward_mark_does_not_wait_on_blocking_host() -> None:
    outcome = simulate([work(1, 9), FORWARD, call(1)])
    assert [row for row in rows(outcome, 0) if row[0] == "compile"] == [("compile", 1, 11)]


def test_gpu_runs_kernel_only_after_its_compile() -> None:
    costs = RoundCosts(kernel=Seconds(1.0, 4.0))
    # Rank 0 queues at 0, compiles until 10, loads until 11, and then its GPU takes 4 s.
    ahead = simulate([BOTH, call(1)], [BOTH], costs=costs, run_ahead=True)
    assert ahead.ends == (15.0, 3.0)


def test_waiting_for_communication_is_not_counted_as_compute() -> None:
    """The result does not depend on the order of ranks."""
    first: list[Op] = [BOTH, work(2, 1), FORWARD, work(3)]
    second: list[Op] = [work(30), BOTH]
    for ranks, index in (((first, second), 0), ((second, first), 1)):
        ahead = simulate(*ranks, run_ahead=True)
        computed = [row for row in rows(ahead, index) if row[0] == "compute"]
        # The GPU's 1 s of work follows the collective, which ends at 33.
        assert computed == [("compute", 0, 2), ("compute", 33, 37)]
        waits = [s for s in ahead.spans if s.rank == index and s.kind == "wait"]
        assert waits == [Span(index, 2, 33, "wait", "GPU")]
