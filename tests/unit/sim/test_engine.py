"""The simulation engine: exact times on small schedules."""

from __future__ import annotations

import pytest

from runner.kernels.rules import kernels_of
from runner.kernels.types import DeepGemmKernelType, KernelCall
from runner.schedule import (
    EXCHANGE,
    Capture,
    Collective,
    KernelWork,
    Mark,
    Op,
    Recv,
    Send,
)
from runner.timeline import Span, Timeline, merge
from sim.costs.profile_costs import Seconds
from sim.engine.engine import SimulationError
from tests.unit.sim_rounds import RoundCosts, call, kernel_of, rows, simulate, work


def test_pipeline_stages_compile_one_after_another() -> None:
    first: list[Op] = [call(1), Send("hidden_states", 1, 100)]
    second: list[Op] = [Recv("hidden_states", 0, 100), call(2)]
    outcome = simulate(first, second, node_of=[0, 1])
    assert rows(outcome, 0) == [
        ("compile", 0, 10),
        ("load", 10, 11),
        ("compute", 11, 13),
        ("comm", 13, 13),
    ]
    assert rows(outcome, 1) == [
        ("wait", 0, 13),
        ("comm", 13, 17),
        ("compile", 17, 27),
        ("load", 27, 28),
        ("compute", 28, 30),
    ]


def test_message_that_has_already_arrived_costs_no_wait() -> None:
    outcome = simulate([Send("x", 1, 1)], [work(20), Recv("x", 0, 1), work(1)])
    assert rows(outcome, 1) == [("compute", 0, 21)]


def test_collective_waits_for_the_slow_rank() -> None:
    group = (0, 1, 2)
    reduce = Collective("all_reduce x", group, 8)
    outcome = simulate([work(1), reduce], [work(7), reduce], [work(2), reduce, work(5)])
    assert rows(outcome, 0) == [("compute", 0, 1), ("wait", 1, 7), ("comm", 7, 10)]
    assert rows(outcome, 1) == [("compute", 0, 7), ("comm", 7, 10)]
    assert rows(outcome, 2) == [
        ("compute", 0, 2),
        ("wait", 2, 7),
        ("comm", 7, 10),
        ("compute", 10, 15),
    ]


def test_two_ranks_that_miss_at_the_same_time_both_compile() -> None:
    outcome = simulate([call(1)], [work(4), call(1)])
    assert rows(outcome, 0) == [("compile", 0, 10), ("load", 10, 11), ("compute", 11, 13)]
    assert rows(outcome, 1) == [
        ("compute", 0, 4),
        ("compile", 4, 14),
        ("load", 14, 15),
        ("compute", 15, 17),
    ]
    timeline = Timeline("none", "predicted", 2, merge(outcome.spans))
    assert (timeline.kernels_compiled, timeline.distinct_kernels, timeline.duplicates) == (2, 1, 1)


def test_later_rank_of_the_node_loads_kernel_from_disk() -> None:
    outcome = simulate([call(1)], [work(10), call(1)])
    assert rows(outcome, 1) == [("compute", 0, 10), ("load", 10, 11), ("compute", 11, 13)]


def test_nodes_do_not_share_disks() -> None:
    outcome = simulate([call(1)], [work(20), call(1)], node_of=[0, 1])
    assert rows(outcome, 1)[1] == ("compile", 20, 30)


def test_rank_loads_a_kernel_once() -> None:
    outcome = simulate([call(1), call(1), call(1)])
    assert rows(outcome, 0) == [("compile", 0, 10), ("load", 10, 11), ("compute", 11, 17)]


def test_cached_kernels_are_not_compiled() -> None:
    outcome = simulate([call(1)], cached=frozenset(kernels_of(call(1))))
    assert rows(outcome, 0) == [("load", 0, 1), ("compute", 1, 3)]


def test_call_of_two_kernels_compiles_both_in_order() -> None:
    dense = KernelCall(DeepGemmKernelType.GEMM_NT_F8F8BF16, 1, 256, 256, 1, 132)
    outcome = simulate([dense])
    assert [s.name for s in outcome.spans if s.kind == "compile"] == [
        "transpose_fp32",
        "sm90_fp8_gemm_1d2d",
    ]
    assert rows(outcome, 0) == [
        ("compile", 0, 10),
        ("load", 10, 11),
        ("compile", 11, 21),
        ("load", 21, 22),
        ("compute", 22, 24),
    ]


def test_compiles_share_cores_if_there_are_too_few() -> None:
    """Three simultaneous compiles of 10 s on two cores run at two thirds of full speed."""
    outcome = simulate([call(1)], [call(2)], [call(3)], costs=RoundCosts(cores=2))
    assert [rows(outcome, rank)[0] for rank in range(3)] == [("compile", 0, 15)] * 3


def test_compile_speeds_up_when_another_one_ends() -> None:
    """One core: the first runs alone until 5 s and is done at 15 s, the second at 20 s."""
    outcome = simulate([call(1)], [work(5), call(2)], costs=RoundCosts(cores=1))
    assert rows(outcome, 0)[0] == ("compile", 0, 15)
    assert rows(outcome, 1)[1] == ("compile", 5, 20)


def test_timeout_names_rank_operation_and_what_it_waits_for() -> None:
    reduce = Collective("all_reduce moe output", (0, 1), 8)
    outcome = simulate([reduce], [call(1), reduce], timeout=6.0)
    lost = outcome.timeout
    assert lost is not None
    assert (lost.time, lost.rank, lost.operation) == (6.0, 0, "all_reduce moe output")
    assert (lost.waiting_for, lost.busy_with) == (1, "compile sm90_tf32_hc_prenorm_gemm")
    assert lost.needed == 13.0
    assert simulate([reduce], [call(1), reduce], timeout=13.0).timeout is None


def test_earliest_timeout_is_reported() -> None:
    one, two = Collective("first", (0, 1), 8), Collective("second", (2, 3), 8)
    outcome = simulate([work(5), one], [work(30), one], [two], [work(25), two], timeout=10.0)
    assert outcome.timeout is not None and outcome.timeout.operation == "second"


def test_needed_limit_is_the_longest_wait_of_the_whole_run() -> None:
    """Rank 0 gives up first, after 10 s of its 15 s wait; rank 2's wait of 40 s comes later."""
    one, two = Collective("first", (0, 1), 8), Collective("second", (2, 3), 8)
    ranks = ([one], [work(15), one], [work(5), two], [work(45), two])
    lost = simulate(*ranks, timeout=10.0).timeout
    assert lost is not None and (lost.operation, lost.needed) == ("first", 40.0)
    assert simulate(*ranks, timeout=39.9).timeout is not None
    assert simulate(*ranks, timeout=40.0).timeout is None


def test_phase_spans_run_from_mark_to_mark() -> None:
    ops: list[Op] = [Mark("phase", "warm-up"), work(2), Mark("phase", "requests"), work(3)]
    outcome = simulate([*ops, Mark("phase", "end")])
    phases = [s for s in outcome.spans if s.kind == "phase"]
    assert phases == [Span(0, 0, 2, "phase", "warm-up"), Span(0, 2, 5, "phase", "requests")]


def test_schedule_that_cannot_end_is_an_error() -> None:
    with pytest.raises(SimulationError, match=r"1 ranks wait forever: rank 0 in recv x"):
        simulate([Recv("x", 1, 1)], [])


def test_nodes_build_their_shares_then_exchange_and_load() -> None:
    a, b, c = (kernel_of(k) for k in (1, 2, 3))
    exchange = Collective(EXCHANGE, (0, 1), 0)
    first: list[Op] = [KernelWork("build", (a, b)), exchange, KernelWork("load", (a, c)), call(3)]
    second: list[Op] = [KernelWork("build", (c,)), exchange, KernelWork("load", (b, c)), call(2)]
    outcome = simulate(first, second, node_of=[0, 1])
    # Two builds of 5 s, an exchange of 3 s, two loads of 1 s, a call of 2 s.
    assert rows(outcome, 0) == [
        ("compile", 0, 5),
        ("compile", 5, 10),
        ("comm", 10, 13),
        ("load", 13, 14),
        ("load", 14, 15),
        ("compute", 15, 17),
    ]
    assert rows(outcome, 1) == [
        ("compile", 0, 5),
        ("wait", 5, 10),
        ("comm", 10, 13),
        ("load", 13, 14),
        ("load", 14, 15),
        ("compute", 15, 17),
    ]
    assert outcome.disks == {0: {a, b, c}, 1: {a, b, c}}


def test_build_skips_kernels_already_on_disk() -> None:
    a, b = kernel_of(1), kernel_of(2)
    outcome = simulate([KernelWork("build", (a, b))], cached=frozenset({a}))
    assert rows(outcome, 0) == [("compile", 0, 5)]


def test_prebuilt_kernels_are_verified_and_loaded() -> None:
    a, b = kernel_of(1), kernel_of(2)
    ops: list[Op] = [KernelWork("verify", (a, b)), KernelWork("load", (a, b)), call(1)]
    outcome = simulate(ops, cached=frozenset({a, b}))
    assert rows(outcome, 0) == [
        ("load", 0, 1),
        ("load", 1, 2),
        ("load", 2, 3),
        ("compute", 3, 5),
    ]


def test_load_of_kernel_that_is_on_no_disk_compiles_it() -> None:
    outcome = simulate([KernelWork("load", (kernel_of(1),))])
    assert rows(outcome, 0) == [("compile", 0, 10), ("load", 10, 11)]


def test_longest_wait_is_reported_without_a_limit() -> None:
    one, two = Collective("first", (0, 1), 8), Collective("second", (0, 1), 8)
    outcome = simulate([work(1), one, two], [work(5), one, work(9), two])
    assert outcome.timeout is None
    # Rank 0 waits from 1 to 5, and from 8, when the first has ended, to 17.
    assert outcome.longest_wait == 9.0
    assert simulate([work(5)]).longest_wait == 0.0


def test_wait_for_a_message_lasts_until_it_is_sent() -> None:
    outcome = simulate([work(9), Send("x", 1, 1)], [work(2), Recv("x", 0, 1)])
    assert outcome.longest_wait == 7.0
    assert rows(outcome, 1) == [("compute", 0, 2), ("wait", 2, 9), ("comm", 9, 13)]


def test_run_starts_at_the_given_time() -> None:
    reduce = Collective("all_reduce x", (0, 1), 8)
    outcome = simulate([reduce], [call(1), reduce], timeout=6.0, start=100.0)
    assert rows(outcome, 0) == [("wait", 100, 113), ("comm", 113, 116)]
    assert rows(outcome, 1)[0] == ("compile", 100, 110)
    assert outcome.timeout is not None and outcome.timeout.time == 106.0
    assert outcome.ends == (116.0, 116.0)


def test_host_and_gpu_time_overlap() -> None:
    # At 4 the host is done with both; the GPU, with 3 s and 5 s of work, is at 8.
    busy_gpu = simulate([work(2, 3), work(2, 5)])
    assert (rows(busy_gpu, 0), busy_gpu.ends) == ([("compute", 0, 8)], (8.0,))
    busy_host = simulate([work(4, 1), work(6, 2)])
    assert rows(busy_host, 0) == [("compute", 0, 10)]


def test_communication_waits_for_the_gpu_and_compile_does_not() -> None:
    reduce = Collective("all_reduce x", (0, 1), 8)
    outcome = simulate([work(1, 7), reduce], [work(2, 2), reduce])
    assert rows(outcome, 0) == [("compute", 0, 7), ("comm", 7, 10)]
    # Compiled and loaded from 1 to 12 while the GPU works until 7; the call ends at 14.
    outcome = simulate([work(1, 7), call(1)])
    assert rows(outcome, 0) == [
        ("compute", 0, 1),
        ("compile", 1, 11),
        ("load", 11, 12),
        ("compute", 12, 14),
    ]
    # With 30 s of the GPU the call's 2 s of the host are over long before.
    assert simulate([work(1, 30), call(1)]).ends == (30.0,)


def test_gpu_starts_a_kernel_after_it_is_compiled() -> None:
    costs = RoundCosts(kernel=Seconds(1.0, 4.0))
    assert simulate([call(1)], costs=costs).ends == (15.0,)


def test_kernel_build_waits_for_the_gpu() -> None:
    outcome = simulate([work(1, 7), KernelWork("build", (kernel_of(1),))])
    assert rows(outcome, 0) == [("compute", 0, 7), ("compile", 7, 12)]


def test_graph_capture_takes_host_time() -> None:
    assert rows(simulate([Capture("graph DECODE 1", 6), work(1)]), 0) == [("compute", 0, 7)]


def test_bulk_loads_have_their_own_cost() -> None:
    a, b = kernel_of(1), kernel_of(2)
    outcome = simulate(
        [KernelWork("load", (a,)), call(2)], cached=frozenset({a, b}), costs=RoundCosts(bulk=0.25)
    )
    assert rows(outcome, 0) == [("load", 0, 0.25), ("load", 0.25, 1.25), ("compute", 1.25, 3.25)]


def test_nodes_of_one_host_share_cores_but_not_disks() -> None:
    def compiled(host_of: list[int] | None) -> list[tuple[str, float, float]]:
        costs = RoundCosts(cores=1)
        outcome = simulate([call(1)], [call(1)], node_of=[0, 1], host_of=host_of, costs=costs)
        return [rows(outcome, rank)[0] for rank in (0, 1)]

    assert compiled(None) == [("compile", 0, 10)] * 2
    assert compiled([0, 1]) == [("compile", 0, 10)] * 2
    assert compiled([0, 0]) == [("compile", 0, 20)] * 2


def test_first_forward_of_each_rank_takes_longer_once() -> None:
    outcome = simulate(
        [work(1), call(1), work(2)], [work(4), work(1)], costs=RoundCosts(first_forward=50.0)
    )
    assert rows(outcome, 0) == [
        ("compute", 0, 51),
        ("compile", 51, 61),
        ("load", 61, 62),
        ("compute", 62, 66),
    ]
    assert rows(outcome, 1) == [("compute", 0, 55)]


# -- disk contents --------------------------------------------------------------------------------


UP = Mark("phase", "requests")


def test_disk_contents_when_up_exclude_further_requests() -> None:
    a, b, c = (kernel_of(k) for k in (1, 2, 3))
    outcome = simulate(
        [Mark("phase", "first request"), call(1), UP, call(2), Mark("phase", "end")],
        [Mark("phase", "first request"), call(1), UP, call(3), Mark("phase", "end")],
        node_of=[0, 1],
    )
    assert outcome.up == {0: {a}, 1: {a}}
    assert outcome.disks == {0: {a, b}, 1: {a, c}}


def test_without_further_requests_final_disk_equals_disk_when_up() -> None:
    outcome = simulate([call(1), call(2)], cached=frozenset({kernel_of(3)}))
    assert outcome.up == outcome.disks == {0: {kernel_of(1), kernel_of(2), kernel_of(3)}}


def test_exchanged_kernels_are_on_every_node_when_up() -> None:
    a, b, c = (kernel_of(k) for k in (1, 2, 3))
    exchange = Collective(EXCHANGE, (0, 1), 0)
    first: list[Op] = [KernelWork("build", (a,)), exchange, UP, call(3)]
    second: list[Op] = [KernelWork("build", (b,)), exchange, UP]
    outcome = simulate(first, second, [UP], node_of=[0, 1, 2])
    assert outcome.up == {0: {a, b}, 1: {a, b}, 2: set()}
    assert outcome.disks == {0: {a, b, c}, 1: {a, b}, 2: set()}
