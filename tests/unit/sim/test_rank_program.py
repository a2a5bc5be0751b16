"""A rank's operations compiled to instructions for the simulation engine."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.kernels.kernel import Kernel
from runner.kernels.rules import RULES, kernels_of
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape, steps_of
from runner.schedule import Capture, Collective, Forward, KernelWork, Mark, Op, Recv, Send, Walk
from sim.costs.profile_costs import Seconds
from sim.engine.rank_program import (
    FirstUse,
    Instruction,
    ProgramCompiler,
    Run,
    WalkRun,
)
from tests.unit.sim_rounds import RoundCosts, call, kernel_of, walk, work

COSTS = RoundCosts(kernel=Seconds(2.0, 5.0))
A, B, C = (kernel_of(k) for k in (1, 2, 3))
REDUCE = Collective("all_reduce x", (0, 1), 8)


def compiled(*ops: Op, locked: bool = False, costs: RoundCosts = COSTS) -> list[Instruction]:
    return ProgramCompiler(costs, RULES, locked=locked).program(ops)


def test_consecutive_local_operations_become_one_run() -> None:
    loaded = KernelWork("load", (A,))
    assert compiled(loaded, work(1, 2), call(1), call(1), work(3))[1:] == [Run(8.0, 12.0)]
    assert compiled() == []


def test_first_use_of_a_kernel_splits_a_run() -> None:
    assert compiled(work(1), call(1), call(1), call(2)) == [
        Run(1.0, 0.0),
        FirstUse((A,)),
        Run(4.0, 10.0),
        FirstUse((B,)),
        Run(2.0, 5.0),
    ]


def test_first_use_names_only_new_kernels() -> None:
    small, large = (GemmShape(T.GEMM_NT_F8F8BF16, 256, 256, 1, 132).call(m) for m in (1, 128))
    uses = [item.kernels for item in compiled(small, large) if isinstance(item, FirstUse)]
    assert uses == [kernels_of(small), kernels_of(large)[1:]]


@pytest.mark.parametrize(
    "op",
    [
        REDUCE,
        Send("x", 1, 8),
        Recv("x", 1, 8),
        Capture("graph DECODE 1", 7),
        Mark("phase", "requests"),
        Mark("forward", "EXTEND 1"),
        KernelWork("build", (A,)),
        KernelWork("verify", (A,)),
    ],
    ids=lambda op: type(op).__name__,
)
def test_operations_that_involve_other_ranks_split_runs(op: Op) -> None:
    assert compiled(work(1), op, work(2)) == [Run(1.0, 0.0), op, Run(2.0, 0.0)]
    assert compiled(op, op) == [op, op]


@pytest.mark.parametrize("kind", ["layer", "yield"])
def test_layer_and_yield_marks_do_not_split_runs(kind: str) -> None:
    assert compiled(work(1), Mark(kind, "0"), work(2)) == [Run(3.0, 0.0)]


def test_bulk_load_is_a_first_use_of_new_kernels() -> None:
    assert compiled(call(1), KernelWork("load", (A, B)), KernelWork("load", (A, B))) == [
        FirstUse((A,)),
        Run(2.0, 5.0),
        FirstUse((B,), bulk=True),
    ]
    assert compiled(KernelWork("load", (A,)), call(1)) == [
        FirstUse((A,), bulk=True),
        Run(2.0, 5.0),
    ]


def test_compile_lock_is_per_gemm_for_all_m() -> None:
    one = call(1)
    key = (one.type, one.n, one.k, one.num_groups)
    uses = compiled(call(1), walk(2), KernelWork("load", (C,)), locked=True)
    locks = [item.lock for item in uses if isinstance(item, FirstUse | WalkRun)]
    assert locks == [key, (one.type, one.n, 128, one.num_groups), None]
    unlocked = compiled(call(1), walk(2))
    assert {item.lock for item in unlocked if isinstance(item, FirstUse | WalkRun)} == {None}


_OPERATIONS = st.sampled_from(
    [
        work(1),
        work(0.5, 2),
        call(1),
        call(2),
        call(3),
        walk(2),
        REDUCE,
        Mark("layer", "0"),
        Mark("forward", "EXTEND 1"),
    ]
)


@given(st.lists(st.lists(_OPERATIONS, min_size=1), max_size=4), st.lists(st.integers(0, 3)))
def test_program_of_forwards_equals_program_of_their_operations(
    forwards: list[list[Op]], order: list[int]
) -> None:
    """Forwards may repeat: their kernels are then loaded already."""
    made = [Forward(tuple(ops)) for ops in forwards]
    parts = [made[index] for index in order if index < len(made)]
    program = ProgramCompiler(COSTS, RULES).program(parts)
    assert program == compiled(*(op for forward in parts for op in forward.ops))


def test_concurrent_walks_share_the_gpu() -> None:
    (made,) = ProgramCompiler(COSTS, RULES, walkers_per_gpu=3).program([walk(1, many=6)])
    assert isinstance(made, WalkRun)
    assert (made.steps[1:], made.calls) == ((((A,), 9.0),), ((6, 1.5),))


# -- walks ----------------------------------------------------------------------------------------


def test_walk_is_a_fixed_cost_followed_by_its_calls() -> None:
    (made,) = compiled(walk(1, many=6))
    # 2 s for the walk; a call takes 0.5 s, the longer of host (0.25 s) and GPU (0.5 s) time.
    steps = (((), 2.0), ((A,), 3.0))
    assert made == WalkRun(walk(1, many=6).name, steps, ((6, 0.5),))
    (_, again) = compiled(KernelWork("load", (A,)), walk(1, many=6))
    assert isinstance(again, WalkRun) and again.steps == (((), 2.0), ((), 3.0))


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.integers(1, 600), min_size=1, max_size=60),
    st.sampled_from(
        [
            GemmShape(T.GEMM_NT_F8F8BF16, 1536, 512, 1, 132),
            GemmShape(T.GEMM_NT_BF16BF16F32, 256, 512, 1, 132),
            GemmShape(T.GROUPED_GEMM_NT_F8F8BF16_MASKED, 512, 512, 4, 132),
            GemmShape(T.TF32_HC_PRENORM_GEMM, 24, 2048, 8, 132),
        ]
    ),
)
def test_walk_steps_name_the_new_kernels_of_their_calls_in_order(
    found: set[int], shape: GemmShape
) -> None:
    """Checked against the kernels of each M."""
    ms = sorted(found)
    (made,) = compiled(Walk(shape, steps_of(ms)))
    assert isinstance(made, WalkRun)
    parts = list(zip(made.steps[1:], made.calls, strict=True))
    assert sum(count for _, (count, _) in parts) == len(ms)
    seen: list[Kernel] = []
    at = 0
    for (new, _), (count, _) in parts:
        part, at = ms[at : at + count], at + count
        # All M of a part run the same kernels; new ones are named in the library's order.
        (needed,) = {kernels_of(shape.call(m)) for m in part}
        assert list(new) == [kernel for kernel in needed if kernel not in seen]
        seen += new
    assert set(seen) == set(chain(*(kernels_of(shape.call(m)) for m in ms)))


# -- the first forward ----------------------------------------------------------------------------


READY = replace(COSTS, first_forward=100.0)


def test_only_the_first_operation_of_a_rank_takes_the_extra_first_forward_time() -> None:
    one = work(1, 2)
    assert compiled(one, one, work(3), costs=READY) == [Run(105.0, 4.0)]
    assert compiled(call(1), call(1), costs=READY)[1:] == [Run(104.0, 10.0)]
    assert compiled(work(1), call(1), REDUCE, work(3), call(1), costs=READY) == [
        Run(101.0, 0.0),
        FirstUse((A,)),
        Run(2.0, 5.0),
        REDUCE,
        Run(5.0, 5.0),
    ]
    # The extra time belongs to the call, not to its first use of kernels.
    assert compiled(call(1), costs=READY) == [FirstUse((A,)), Run(102.0, 5.0)]


class CostsAtM(RoundCosts):
    """Each call in a walk takes its mean M on the host, and the walk's largest M on the GPU."""

    def walk_call_seconds(self, shape: GemmShape, mean_m: float, max_m: int) -> Seconds:
        return Seconds(mean_m, float(max_m))


def test_walk_call_cost_uses_mean_m_of_its_part_and_largest_m_of_the_walk() -> None:
    shape = GemmShape(T.GEMM_NT_F8F8BF16, 256, 256, 1, 132)
    (made,) = compiled(Walk(shape, ((1, 128, 1),)), costs=CostsAtM())
    assert isinstance(made, WalkRun)
    counts = [count for count, _ in made.calls]
    assert sum(counts) == 128 and {device for _, device in made.calls} == {128.0}
    assert [seconds for _, seconds in made.steps[1:]] == [128.0 * count for count in counts]
    (made,) = compiled(Walk(shape, ((1001, 1001, 1),)), costs=CostsAtM())
    assert isinstance(made, WalkRun) and made.steps[1][1] == 1001.0
