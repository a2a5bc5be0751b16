"""Exact virtual times on small schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.jit.kernel_type import DeepGemmKernelType, KernelCall
from runner.jit.kernels import Kernel, kernels_of
from runner.schedule import (
    EXCHANGE,
    Collective,
    Compute,
    KernelWork,
    Mark,
    Op,
    Recv,
    Schedule,
    Send,
)
from runner.timeline import Span, Timeline, merge
from sim.cores import Cores
from sim.engine import Engine, Outcome, SimulationError


@dataclass(frozen=True)
class RoundCosts:
    """Costs one can add up by hand."""

    compile: float = 10.0
    load: float = 1.0
    kernel: float = 2.0
    collective: float = 3.0
    transfer: float = 4.0

    def compile_seconds(self, kernel: Kernel) -> float:
        return self.compile

    def build_spans(
        self, kernels: Sequence[Kernel], cores: int
    ) -> list[tuple[Kernel | None, float, float]]:
        return [(kernel, 5.0 * i, 5.0 * i + 5.0) for i, kernel in enumerate(kernels)]

    def verify_seconds(self, kernel: Kernel) -> float:
        return 0.5

    def load_seconds(self, kernel: Kernel) -> float:
        return self.load

    def kernel_seconds(self, call: KernelCall) -> float:
        return self.kernel

    def compute_seconds(self, op: Compute) -> float:
        return float(op.flops)

    def collective_seconds(self, op: Collective) -> float:
        return self.collective

    def transfer_seconds(self, nbytes: int) -> float:
        return self.transfer


# The hyper-connection GEMM is one kernel a call; K makes different ones.
def call(k: int) -> KernelCall:
    return KernelCall(DeepGemmKernelType.TF32_HC_PRENORM_GEMM, 1, 24, 64 * k, 1, 132)


def work(seconds: int) -> Compute:
    return Compute("work", seconds, 0)


def simulate(
    *ranks: list[Op],
    node_of: list[int] | None = None,
    cores: int = 8,
    timeout: float | None = None,
    costs: RoundCosts | None = None,
    cached: frozenset[Kernel] = frozenset(),
) -> Outcome:
    return Engine(
        Schedule(tuple(tuple(ops) for ops in ranks)),
        costs or RoundCosts(),
        node_of=node_of or [0] * len(ranks),
        cores_per_node=cores,
        timeout=timeout,
        cached=cached,
    ).run()


def rows(outcome: Outcome, rank: int) -> list[tuple[str, float, float]]:
    return [(s.kind, s.start, s.end) for s in merge(outcome.spans) if s.rank == rank]


def test_two_stage_pipeline_compiles_in_turn() -> None:
    first: list[Op] = [call(1), Send("hidden_states", 1, 100)]
    second: list[Op] = [Recv("hidden_states", 0, 100), call(2)]
    outcome = simulate(first, second, node_of=[0, 1])
    assert rows(outcome, 0) == [
        ("compile", 0, 10), ("load", 10, 11), ("compute", 11, 13), ("comm", 13, 13),
    ]  # fmt: skip
    assert rows(outcome, 1) == [
        ("wait", 0, 13), ("comm", 13, 17), ("compile", 17, 27), ("load", 27, 28),
        ("compute", 28, 30),
    ]  # fmt: skip


def test_message_that_is_already_there_costs_no_wait() -> None:
    outcome = simulate([Send("x", 1, 1)], [work(20), Recv("x", 0, 1), work(1)])
    assert rows(outcome, 1) == [("compute", 0, 21)]


def test_collective_waits_for_the_slow_rank() -> None:
    group = (0, 1, 2)
    reduce = Collective("all_reduce x", group, 8)
    outcome = simulate([work(1), reduce], [work(7), reduce], [work(2), reduce, work(5)])
    assert rows(outcome, 0) == [("compute", 0, 1), ("wait", 1, 7), ("comm", 7, 10)]
    assert rows(outcome, 1) == [("compute", 0, 7), ("comm", 7, 10)]
    assert rows(outcome, 2) == [
        ("compute", 0, 2), ("wait", 2, 7), ("comm", 7, 10), ("compute", 10, 15),
    ]  # fmt: skip


def test_two_ranks_that_miss_at_once_both_compile() -> None:
    outcome = simulate([call(1)], [work(4), call(1)])
    assert rows(outcome, 0) == [("compile", 0, 10), ("load", 10, 11), ("compute", 11, 13)]
    assert rows(outcome, 1) == [
        ("compute", 0, 4), ("compile", 4, 14), ("load", 14, 15), ("compute", 15, 17),
    ]  # fmt: skip
    timeline = Timeline("none", "predicted", 2, merge(outcome.spans))
    assert (timeline.kernels_compiled, timeline.distinct_kernels, timeline.duplicates) == (2, 1, 1)


def test_a_later_rank_of_the_node_loads_from_disk() -> None:
    outcome = simulate([call(1)], [work(10), call(1)])
    assert rows(outcome, 1) == [("compute", 0, 10), ("load", 10, 11), ("compute", 11, 13)]


def test_nodes_do_not_share_their_disks() -> None:
    outcome = simulate([call(1)], [work(20), call(1)], node_of=[0, 1])
    assert rows(outcome, 1)[1] == ("compile", 20, 30)


def test_a_kernel_is_loaded_once() -> None:
    outcome = simulate([call(1), call(1), call(1)])
    assert rows(outcome, 0) == [("compile", 0, 10), ("load", 10, 11), ("compute", 11, 17)]


def test_cached_kernels_are_not_compiled() -> None:
    outcome = simulate([call(1)], cached=frozenset(kernels_of(call(1))))
    assert rows(outcome, 0) == [("load", 0, 1), ("compute", 1, 3)]


def test_a_call_of_two_kernels_compiles_both_in_order() -> None:
    dense = KernelCall(DeepGemmKernelType.GEMM_NT_F8F8BF16, 1, 256, 256, 1, 132)
    outcome = simulate([dense])
    assert [s.name for s in outcome.spans if s.kind == "compile"] == [
        "transpose_fp32", "sm90_fp8_gemm_1d2d",
    ]  # fmt: skip
    assert rows(outcome, 0) == [
        ("compile", 0, 10), ("load", 10, 11), ("compile", 11, 21), ("load", 21, 22),
        ("compute", 22, 24),
    ]  # fmt: skip


def test_exhausted_cores_are_shared() -> None:
    """Two cores, three compiles of 10 s at once: two thirds of the speed each."""
    outcome = simulate([call(1)], [call(2)], [call(3)], cores=2)
    assert [rows(outcome, rank)[0] for rank in range(3)] == [("compile", 0, 15)] * 3


def test_cores_free_up_as_compiles_end() -> None:
    """One core: alone until 5 s, then two share; 5 s of work left each end at 15 s and 20 s."""
    outcome = simulate([call(1)], [work(5), call(2)], cores=1)
    assert rows(outcome, 0)[0] == ("compile", 0, 15)
    assert rows(outcome, 1)[1] == ("compile", 5, 20)


def test_timeout_names_the_rank_the_operation_and_what_it_waits_for() -> None:
    reduce = Collective("all_reduce moe output", (0, 1), 8)
    outcome = simulate([reduce], [call(1), reduce], timeout=6.0)
    lost = outcome.timeout
    assert lost is not None
    assert (lost.time, lost.rank, lost.operation) == (6.0, 0, "all_reduce moe output")
    assert (lost.waiting_for, lost.busy_with) == (1, "compile sm90_tf32_hc_prenorm_gemm")
    assert lost.needed == 13.0
    assert simulate([reduce], [call(1), reduce], timeout=13.0).timeout is None


def test_the_earliest_timeout_is_the_one_that_counts() -> None:
    one, two = Collective("first", (0, 1), 8), Collective("second", (2, 3), 8)
    outcome = simulate([work(5), one], [work(30), one], [two], [work(25), two], timeout=10.0)
    assert outcome.timeout is not None and outcome.timeout.operation == "second"


def test_the_limit_that_is_needed_is_that_of_the_whole_run() -> None:
    """Rank 0 gives up first, after 10 s of its 15 s wait; rank 2's wait of 40 s comes later."""
    one, two = Collective("first", (0, 1), 8), Collective("second", (2, 3), 8)
    ranks = ([one], [work(15), one], [work(5), two], [work(45), two])
    lost = simulate(*ranks, timeout=10.0).timeout
    assert lost is not None and (lost.operation, lost.needed) == ("first", 40.0)
    assert simulate(*ranks, timeout=39.9).timeout is not None
    assert simulate(*ranks, timeout=40.0).timeout is None


def test_receive_times_out_too() -> None:
    outcome = simulate([work(9), Send("x", 1, 1)], [Recv("x", 0, 1)], timeout=8.0)
    assert outcome.timeout is not None
    assert (outcome.timeout.operation, outcome.timeout.waiting_for) == ("recv x", 0)


def test_phases_enclose_what_they_hold() -> None:
    ops: list[Op] = [Mark("phase", "warm-up"), work(2), Mark("phase", "requests"), work(3)]
    outcome = simulate([*ops, Mark("phase", "end")])
    phases = [s for s in outcome.spans if s.kind == "phase"]
    assert phases == [Span(0, 0, 2, "phase", "warm-up"), Span(0, 2, 5, "phase", "requests")]


def test_a_schedule_that_cannot_end_is_an_error() -> None:
    with pytest.raises(SimulationError, match=r"1 ranks wait for ever: rank 0 in recv x"):
        simulate([Recv("x", 1, 1)], [])


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=8),
    st.integers(1, 4),
)
def test_cores_do_all_work_and_never_more_than_they_can(
    jobs: list[tuple[int, int]], count: int
) -> None:
    """Shared cores end every job, not before its own length, and keep within total capacity."""
    cores = Cores(count)
    starts = sorted(jobs)
    ends: dict[int, float] = {}
    pending = list(enumerate(starts))
    while pending or cores.next_end() is not None:
        end = cores.next_end()
        if pending and (end is None or pending[0][1][0] <= end):
            index, (start, seconds) = pending.pop(0)
            cores.start(start, seconds, lambda at, index=index: ends.__setitem__(index, at))
        else:
            assert end is not None
            cores.finish(end)
    total = sum(seconds for _, seconds in starts)
    assert len(ends) == len(starts)
    for index, (start, seconds) in enumerate(starts):
        assert ends[index] >= start + seconds - 1e-6
    assert max(ends.values()) >= starts[0][0] + total / count - 1e-6
    assert max(ends.values()) <= starts[-1][0] + total + 1e-6


def kernel_of(k: int) -> Kernel:
    return kernels_of(call(k))[0]


def test_nodes_build_their_shares_exchange_and_load() -> None:
    a, b, c = (kernel_of(k) for k in (1, 2, 3))
    exchange = Collective(EXCHANGE, (0, 1), 0)
    first: list[Op] = [KernelWork("build", (a, b)), exchange, KernelWork("load", (a, c)), call(3)]
    second: list[Op] = [KernelWork("build", (c,)), exchange, KernelWork("load", (b, c)), call(2)]
    outcome = simulate(first, second, node_of=[0, 1])
    # Two builds of 5 s, an exchange of 3 s, two loads of 1 s, a call of 2 s.
    assert rows(outcome, 0) == [
        ("compile", 0, 5), ("compile", 5, 10), ("comm", 10, 13), ("load", 13, 14),
        ("load", 14, 15), ("compute", 15, 17),
    ]  # fmt: skip
    assert rows(outcome, 1) == [
        ("compile", 0, 5), ("wait", 5, 10), ("comm", 10, 13), ("load", 13, 14),
        ("load", 14, 15), ("compute", 15, 17),
    ]  # fmt: skip
    assert outcome.disks == {0: {a, b, c}, 1: {a, b, c}}


def test_a_build_leaves_what_the_disk_holds() -> None:
    a, b = kernel_of(1), kernel_of(2)
    outcome = simulate([KernelWork("build", (a, b))], cached=frozenset({a}))
    assert rows(outcome, 0) == [("compile", 0, 5)]


def test_prebuilt_kernels_are_verified_and_loaded() -> None:
    a, b = kernel_of(1), kernel_of(2)
    ops: list[Op] = [KernelWork("verify", (a, b)), KernelWork("load", (a, b)), call(1)]
    outcome = simulate(ops, cached=frozenset({a, b}))
    assert rows(outcome, 0) == [
        ("load", 0, 1), ("load", 1, 2), ("load", 2, 3), ("compute", 3, 5),
    ]  # fmt: skip


def test_loading_what_no_disk_holds_compiles_it() -> None:
    outcome = simulate([KernelWork("load", (kernel_of(1),))])
    assert rows(outcome, 0) == [("compile", 0, 10), ("load", 10, 11)]


def test_who_waits_too_long_for_a_build_dies() -> None:
    exchange = Collective(EXCHANGE, (0, 1), 0)
    builder: list[Op] = [KernelWork("build", tuple(kernel_of(k) for k in range(1, 5))), exchange]
    outcome = simulate(builder, [KernelWork("build", ()), exchange], timeout=15.0)
    lost = outcome.timeout
    assert lost is not None
    assert (lost.rank, lost.waiting_for, lost.operation, lost.needed) == (1, 0, EXCHANGE, 20.0)
