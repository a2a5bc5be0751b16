"""Hosts that queue communication and run ahead of their GPUs, as over NCCL."""

from __future__ import annotations

from runner.schedule import EXCHANGE, Collective, KernelWork, Mark, Op, Recv, Send
from sim.costs import Seconds
from tests.unit.sim_rounds import RoundCosts, call, kernel_of, rows, simulate, work

BOTH = Collective("all_reduce x", (0, 1), 8)
FORWARD = Mark("forward", "EXTEND 1")


def test_a_host_compiles_while_its_gpu_waits() -> None:
    first: list[Op] = [BOTH, call(1)]
    second: list[Op] = [work(20), BOTH]
    blocking = simulate(first, second)
    assert rows(blocking, 0) == [
        ("wait", 0, 20), ("comm", 20, 23), ("compile", 23, 33), ("load", 33, 34),
        ("compute", 34, 36),
    ]  # fmt: skip
    ahead = simulate(first, second, run_ahead=True)
    assert [row for row in rows(ahead, 0) if row[0] in ("compile", "load")] == [
        ("compile", 0, 10), ("load", 10, 11),
    ]  # fmt: skip
    assert [row for row in rows(ahead, 0) if row[0] in ("wait", "comm")] == [
        ("wait", 0, 20), ("comm", 20, 23),
    ]  # fmt: skip
    assert (blocking.ends, ahead.ends) == ((36.0, 23.0), (23.0, 23.0))


def test_the_gpu_works_its_queue_off_in_order() -> None:
    # Host: queued at 0, run at 1; GPU: the collective until 8, then 4 s.
    ahead = simulate([BOTH, work(1, 4), BOTH], [work(5), BOTH, BOTH], run_ahead=True)
    assert ahead.ends == (15.0, 15.0)
    # Rank 1's GPU comes to the second collective at 8 and waits until rank 0's is there at 12.
    assert [row for row in rows(ahead, 1) if row[0] != "compute"] == [
        ("comm", 5, 8), ("wait", 8, 12), ("comm", 12, 15),
    ]  # fmt: skip


def test_a_wait_counts_from_queueing() -> None:
    """Blocking, rank 0 begins to wait at 13 for the second; ahead, it has queued it at 1."""
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


def test_a_receive_always_waits() -> None:
    outcome = simulate([work(6), Send("x", 1, 1)], [Recv("x", 0, 1), call(1)], run_ahead=True)
    assert rows(outcome, 1) == [
        ("wait", 0, 6), ("comm", 6, 10), ("compile", 10, 20), ("load", 20, 21),
        ("compute", 21, 23),
    ]  # fmt: skip


def test_a_receive_has_no_limit_of_its_own() -> None:
    """What a server receives it learns of over gloo, whose limit is another."""
    ranks: tuple[list[Op], list[Op]] = ([work(60), Send("x", 1, 1)], [Recv("x", 0, 1)])
    ahead = simulate(*ranks, run_ahead=True, timeout=5.0)
    assert (ahead.timeout, ahead.longest_wait) == (None, 0.0)
    blocking = simulate(*ranks, timeout=5.0)
    assert blocking.timeout is not None and blocking.longest_wait == 60.0


def test_a_send_leaves_once_the_gpu_comes_to_it() -> None:
    outcome = simulate([work(1, 6), Send("x", 1, 1), call(1)], [Recv("x", 0, 1)], run_ahead=True)
    # The host compiles from 1 on; what is sent is there 4 s after the GPU's 6.
    assert [row for row in rows(outcome, 0) if row[0] == "compile"] == [("compile", 1, 11)]
    assert rows(outcome, 1) == [("wait", 0, 6), ("comm", 6, 10)]


def test_an_exchange_of_kernels_waits() -> None:
    exchange = Collective(EXCHANGE, (0, 1), 0)
    first: list[Op] = [KernelWork("build", (kernel_of(1),)), exchange, call(2)]
    second: list[Op] = [KernelWork("build", (kernel_of(2),)), work(4), exchange, call(1)]
    outcome = simulate(first, second, node_of=[0, 1], run_ahead=True)
    assert rows(outcome, 0) == [
        ("compile", 0, 5), ("wait", 5, 9), ("comm", 9, 12), ("load", 12, 13), ("compute", 13, 15),
    ]  # fmt: skip


def test_a_forward_begins_with_the_gpu_done() -> None:
    ops: list[Op] = [BOTH, FORWARD, call(1)]
    second: list[Op] = [work(20), BOTH]
    ahead = simulate(ops, second, run_ahead=True)
    assert [row for row in rows(ahead, 0) if row[0] == "compile"] == [("compile", 23, 33)]
    only_gpu = simulate([work(1, 9), FORWARD, call(1)], run_ahead=True)
    assert [row for row in rows(only_gpu, 0) if row[0] == "compile"] == [("compile", 9, 19)]


def test_blocking_a_forwards_mark_waits_for_nothing() -> None:
    outcome = simulate([work(1, 9), FORWARD, call(1)])
    assert [row for row in rows(outcome, 0) if row[0] == "compile"] == [("compile", 1, 11)]


def test_a_phase_ends_with_the_gpu_done_either_way() -> None:
    ops: list[Op] = [Mark("phase", "warm-up"), work(1, 9), Mark("phase", "end")]
    for ahead in (False, True):
        (phase,) = (s for s in simulate(ops, run_ahead=ahead).spans if s.kind == "phase")
        assert (phase.start, phase.end) == (0, 9)


def test_what_is_queued_behind_a_compile_does_not_begin_before_it() -> None:
    costs = RoundCosts(kernel=Seconds(1.0, 4.0))
    # Rank 0 queues at 0, compiles until 10, loads until 11, and then its GPU takes 4 s.
    ahead = simulate([BOTH, call(1)], [BOTH], costs=costs, run_ahead=True)
    assert ahead.ends == (15.0, 3.0)


def test_a_rank_that_hosts_nothing_else_ends_with_its_gpu() -> None:
    ahead = simulate([BOTH, work(1)], [call(1), BOTH], run_ahead=True)
    assert ahead.ends == (16.0, 16.0)


def test_a_wait_for_communication_is_no_computing() -> None:
    """Work, then a forward's end that waits for a collective, whichever rank is seen first."""
    first: list[Op] = [BOTH, work(2, 1), FORWARD, work(3)]
    second: list[Op] = [work(30), BOTH]
    for ranks, index in (((first, second), 0), ((second, first), 1)):
        ahead = simulate(*ranks, run_ahead=True)
        computed = [row for row in rows(ahead, index) if row[0] == "compute"]
        # The GPU's second of work comes after the collective, which ends at 33.
        assert computed == [("compute", 0, 2), ("compute", 33, 37)]
