"""The simulation engine: walks over M, and the per-GEMM compile lock of a node."""

from __future__ import annotations

from runner.kernels.rules import kernels_of
from runner.kernels.types import DeepGemmKernelType, GemmShape, KernelCall
from runner.schedule import Walk
from runner.timeline import Span, Timeline, merge
from sim.engine.engine import Outcome
from tests.unit.sim_rounds import RoundCosts, call, kernel_of, rows, simulate, walk, work

# A walk takes 2 s, each of its calls 0.5 s: the GPU's time, longer than the host's 0.25 s.


def counts(outcome: Outcome) -> tuple[int, int]:
    timeline = Timeline("none", "predicted", 2, merge(outcome.spans))
    return timeline.kernels_compiled, timeline.duplicates


def test_walk_compiles_its_kernel_and_calls_it_with_every_m() -> None:
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


def test_walk_of_loaded_kernel_only_calls_it() -> None:
    outcome = simulate([call(1), walk(1, many=2)])
    assert rows(outcome, 0)[2:] == [("compute", 11, 13), ("load", 13, 15), ("load", 15, 16)]


def test_walk_compiles_at_each_m_where_the_kernel_changes() -> None:
    # This GEMM runs one kernel after the transpose for M of 1 to 64, and another for M of 128.
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
        # The load ends at 24; two calls of 0.5 s follow.
        Span(0, 25, 35, "compile", large[1].name, large[1].identity),
    ]
    assert outcome.ends == (36.5,)


def test_concurrent_walks_compile_the_same_kernel_twice() -> None:
    outcome = simulate([walk(1)], [walk(1)])
    assert [rows(outcome, rank)[1] for rank in (0, 1)] == [("compile", 2, 12)] * 2
    assert counts(outcome) == (2, 1)


# -- locks ----------------------------------------------------------------------------------------


def test_rank_that_waited_for_compile_lock_finds_kernel_on_disk() -> None:
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


def test_compile_lock_is_first_come_first_served() -> None:
    outcome = simulate([call(1)], [work(5), call(1)], [work(3), call(1)], compile_lock=True)
    assert rows(outcome, 2)[1:3] == [("wait", 3, 11), ("load", 11, 12)]
    assert rows(outcome, 1)[1:3] == [("wait", 5, 12), ("load", 12, 13)]


def test_compile_lock_is_per_gemm_and_node() -> None:
    other_gemm = simulate([call(1)], [call(2)], compile_lock=True)
    assert [rows(other_gemm, rank)[0] for rank in (0, 1)] == [("compile", 0, 10)] * 2
    other_node = simulate([call(1)], [call(1)], node_of=[0, 1], compile_lock=True)
    assert [rows(other_node, rank)[0] for rank in (0, 1)] == [("compile", 0, 10)] * 2


def test_calls_of_one_gemm_share_a_lock_for_all_m_and_kernels() -> None:
    one, other = (
        KernelCall(DeepGemmKernelType.GEMM_NT_F8F8BF16, m, 256, 256, 1, 132) for m in (1, 128)
    )
    assert kernels_of(one)[1] != kernels_of(other)[1]
    outcome = simulate([one], [other], compile_lock=True)
    # The second rank finds the transpose on disk and compiles its own kernel.
    assert rows(outcome, 1) == [
        ("wait", 0, 22),
        ("load", 22, 23),
        ("compile", 23, 33),
        ("load", 33, 34),
        ("compute", 34, 36),
    ]


def test_walk_holds_the_compile_lock_to_its_end() -> None:
    outcome = simulate([walk(1, many=6)], [work(1), call(1)], compile_lock=True)
    assert rows(outcome, 1) == [
        ("compute", 0, 1),
        ("wait", 1, 16),
        ("load", 16, 17),
        ("compute", 17, 19),
    ]


def test_walk_waits_for_the_compile_lock() -> None:
    outcome = simulate([call(1)], [walk(1)], compile_lock=True)
    assert rows(outcome, 1) == [
        ("wait", 0, 11),
        ("load", 11, 13),
        ("load", 13, 14),
        ("load", 14, 14.5),
    ]


def test_load_from_disk_also_takes_the_compile_lock() -> None:
    outcome = simulate(
        [call(1)],
        [call(1)],
        compile_lock=True,
        cached=frozenset({kernel_of(1)}),
        costs=RoundCosts(load=4.0),
    )
    assert rows(outcome, 1) == [("wait", 0, 4), ("load", 4, 8), ("compute", 8, 10)]
