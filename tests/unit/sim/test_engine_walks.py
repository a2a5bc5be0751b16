"""Walks, and ranks of a node that take turns at first uses."""

from __future__ import annotations

from runner.kernels.rules import kernels_of
from runner.kernels.types import DeepGemmKernelType, GemmShape, KernelCall
from runner.schedule import Walk
from runner.timeline import Span, Timeline, merge
from sim.engine.engine import Outcome
from tests.unit.sim_rounds import RoundCosts, call, kernel_of, rows, simulate, walk, work

# A walk takes 2 s, each of its calls 0.5 s, the longer of the host's 0.25 s and the GPU's.


def counts(outcome: Outcome) -> tuple[int, int]:
    timeline = Timeline("none", "predicted", 2, merge(outcome.spans))
    return timeline.kernels_compiled, timeline.duplicates


def test_a_walk_brings_its_kernel_in_and_calls_it_with_every_m() -> None:
    outcome = simulate([walk(1, many=6), call(1)])
    assert rows(outcome, 0) == [
        ("load", 0, 2),
        ("compile", 2, 12),
        ("load", 12, 13),
        ("load", 13, 16),
        ("compute", 16, 18),
    ]
    assert [s.name for s in outcome.spans if s.kind == "load"] == [
        walk(1, 6).name,
        "sm90_tf32_hc_prenorm_gemm",
        walk(1, 6).name,
    ]


def test_a_walk_of_what_is_loaded_only_calls() -> None:
    outcome = simulate([call(1), walk(1, many=2)])
    assert rows(outcome, 0)[2:] == [("compute", 11, 13), ("load", 13, 15), ("load", 15, 16)]


def test_a_walk_compiles_where_kernels_change_with_m() -> None:
    # Of this GEMM M of 1 to 64 run one kernel beside the transpose, M of 128 another.
    shape = GemmShape(DeepGemmKernelType.GEMM_NT_F8F8BF16, 256, 256, 1, 132)
    small, large = (kernels_of(shape.call(m)) for m in (1, 128))
    assert small[0] == large[0] and small[1] != large[1]
    first = [m for m in range(1, 129) if kernels_of(shape.call(m)) == small][-1]
    assert kernels_of(shape.call(first + 1)) != small
    steps = Walk(shape, ((first - 1, first, 1), (128, 128, 1)))
    outcome = simulate([steps])
    assert [s for s in outcome.spans if s.kind == "compile"] == [
        Span(0, 2, 12, "compile", small[0].name, small[0].identity),
        Span(0, 13, 23, "compile", small[1].name, small[1].identity),
        # Two calls of 0.5 s after the load until 24.
        Span(0, 25, 35, "compile", large[1].name, large[1].identity),
    ]
    assert outcome.ends == (36.5,)


def test_walks_side_by_side_compile_the_same_twice() -> None:
    outcome = simulate([walk(1)], [walk(1)])
    assert [rows(outcome, rank)[1] for rank in (0, 1)] == [("compile", 2, 12)] * 2
    assert counts(outcome) == (2, 1)


# -- locks ----------------------------------------------------------------------------------------


def test_who_waits_for_a_lock_finds_the_kernel_on_disk() -> None:
    outcome = simulate([call(1)], [work(4), call(1)], compile_lock=True)
    assert rows(outcome, 0) == [("compile", 0, 10), ("load", 10, 11), ("compute", 11, 13)]
    assert rows(outcome, 1) == [
        ("compute", 0, 4),
        ("wait", 4, 11),
        ("load", 11, 12),
        ("compute", 12, 14),
    ]
    (waited,) = (s for s in outcome.spans if s.kind == "wait")
    assert (waited.rank, waited.name, waited.key) == (1, "compile lock", "")
    assert counts(outcome) == (1, 0)


def test_a_lock_is_handed_on_in_the_order_of_asking() -> None:
    outcome = simulate([call(1)], [work(5), call(1)], [work(3), call(1)], compile_lock=True)
    assert rows(outcome, 2)[1:3] == [("wait", 3, 11), ("load", 11, 12)]
    assert rows(outcome, 1)[1:3] == [("wait", 5, 12), ("load", 12, 13)]


def test_a_lock_is_of_one_gemm_on_one_node() -> None:
    other_gemm = simulate([call(1)], [call(2)], compile_lock=True)
    assert [rows(other_gemm, rank)[0] for rank in (0, 1)] == [("compile", 0, 10)] * 2
    other_node = simulate([call(1)], [call(1)], node_of=[0, 1], compile_lock=True)
    assert [rows(other_node, rank)[0] for rank in (0, 1)] == [("compile", 0, 10)] * 2


def test_calls_of_one_gemm_share_a_lock_whatever_their_m_and_their_kernel() -> None:
    one, other = (
        KernelCall(DeepGemmKernelType.GEMM_NT_F8F8BF16, m, 256, 256, 1, 132) for m in (1, 128)
    )
    assert kernels_of(one)[1] != kernels_of(other)[1]
    outcome = simulate([one], [other], compile_lock=True)
    # The second finds the transpose and compiles its own kernel.
    assert rows(outcome, 1) == [
        ("wait", 0, 22),
        ("load", 22, 23),
        ("compile", 23, 33),
        ("load", 33, 34),
        ("compute", 34, 36),
    ]


def test_a_walk_holds_the_lock_to_its_end() -> None:
    outcome = simulate([walk(1, many=6)], [work(1), call(1)], compile_lock=True)
    assert rows(outcome, 1) == [
        ("compute", 0, 1),
        ("wait", 1, 16),
        ("load", 16, 17),
        ("compute", 17, 19),
    ]


def test_a_walk_waits_for_the_lock() -> None:
    outcome = simulate([call(1)], [walk(1)], compile_lock=True)
    assert rows(outcome, 1) == [
        ("wait", 0, 11),
        ("load", 11, 13),
        ("load", 13, 14),
        ("load", 14, 14.5),
    ]


def test_a_hit_on_disk_takes_its_turn_too() -> None:
    outcome = simulate(
        [call(1)],
        [call(1)],
        compile_lock=True,
        cached=frozenset({kernel_of(1)}),
        costs=RoundCosts(load=4.0),
    )
    assert rows(outcome, 1) == [("wait", 0, 4), ("load", 4, 8), ("compute", 8, 10)]
