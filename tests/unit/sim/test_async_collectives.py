"""Asynchronous collectives in the simulation engine, with times checked by hand."""

from __future__ import annotations

import pytest

from runner.model.operations import overlapped_order
from runner.schedule import Await, Begin, Collective, Compute, Mark, Op
from runner.timeline import Span
from sim.engine.engine import SimulationError
from tests.unit.sim_rounds import simulate, work


def begin(name: str, seconds: int) -> Begin:
    return Begin(name, (0, 1), seconds)


def gpu(seconds: int) -> Compute:
    """Work that takes GPU time only."""
    return Compute("work", 0, seconds)


def ends(*ops: Op) -> float:
    """When two ranks that run the same operations end."""
    outcome = simulate(ops, ops, run_ahead=True)
    assert outcome.ends[0] == outcome.ends[1]
    return outcome.ends[0]


def test_collective_awaited_at_once_is_fully_exposed() -> None:
    assert ends(gpu(2), begin("a", 5), Await("a"), gpu(3)) == 2 + 5 + 3


@pytest.mark.parametrize(("between", "end"), [(1, 10), (5, 10), (7, 12)])
def test_work_before_the_await_hides_the_collective(between: int, end: int) -> None:
    assert ends(gpu(2), begin("a", 5), gpu(between), Await("a"), gpu(3)) == end


def test_asynchronous_collectives_run_one_after_another() -> None:
    # The second starts at 7, when the first ends; the wait for it starts at 3.
    assert ends(gpu(2), begin("a", 5), gpu(1), begin("b", 4), Await("b"), gpu(3)) == 2 + 5 + 4 + 3


def test_asynchronous_collective_starts_with_its_last_member() -> None:
    slow: list[Op] = [gpu(9), begin("a", 5), Await("a")]
    fast: list[Op] = [gpu(2), begin("a", 5), gpu(1), Await("a"), gpu(3)]
    outcome = simulate(slow, fast, run_ahead=True)
    assert outcome.ends == (14.0, 17.0)
    streams = [span for span in outcome.spans if span.kind == "beside"]
    assert [(span.rank, span.start, span.end, span.name) for span in streams] == [
        (0, 9, 14, "a"),
        (1, 2, 14, "a"),
    ]
    assert Span(1, 3, 14, "wait", "a") in outcome.spans


def test_host_that_does_not_run_ahead_blocks_at_await() -> None:
    ops: list[Op] = [begin("a", 5), work(2), Await("a"), work(3)]
    outcome = simulate(ops, ops)
    assert outcome.ends == (8.0, 8.0)


def test_collective_that_other_ranks_never_begin_is_an_error() -> None:
    with pytest.raises(SimulationError, match="rank 0 in a, which other ranks have not begun"):
        simulate([begin("a", 1), Await("a")], [gpu(1)], run_ahead=True)


# -- two layers of two batches --------------------------------------------------------------------

TIMES = {"attn": 4, "gate": 1, "experts": 3, "combine_b": 0, "output": 1}
DISPATCH, COMBINE, SHARED = 4, 5, 2


def stages(placement: str, batch: int) -> list[list[Op]]:
    """Two small layers, cut into stages as SGLang did for decode before and after PR 6711."""
    dispatch, combine = f"dispatch {batch}", f"combine {batch}"
    first: list[Op] = [gpu(TIMES["attn"])]
    selects: list[Op] = [gpu(TIMES["gate"])]
    shadow: list[Op] = [begin(dispatch, DISPATCH), gpu(SHARED)]
    experts: list[Op] = [Await(dispatch), gpu(TIMES["experts"]), begin(combine, COMBINE)]
    wait: list[Op] = [Await(combine)]
    output: list[Op] = [gpu(TIMES["output"])]
    if placement == "before":
        layer = [first, selects, shadow, experts, wait + output]
        return layer + layer
    return [
        first,
        selects,
        shadow,
        experts,
        wait,
        output + first,
        selects,
        shadow,
        experts,
        wait,
        output,
    ]


def step(placement: str, delta: int) -> float:
    both = stages(placement, 0), stages(placement, 1)
    order = overlapped_order(len(both[0]), delta)
    return ends(*(op for batch, stage in order for op in both[batch][stage]))


def plain() -> float:
    return ends(*(op for stage in stages("before", 0) for op in stage))


def test_unsplit_batch_hides_dispatch_behind_shared_experts_only() -> None:
    # Per layer: 4 + 1 + 2, the rest of the dispatch (2), 3, the combine (5), 1.
    assert plain() == 2 * (4 + 1 + 2 + (DISPATCH - SHARED) + 3 + COMBINE + 1)


def test_step_time_with_the_placement_before_pr_6711() -> None:
    """Batches A and B in turns, delta 2; "> t" is a wait until t; A2 and B2 are in layer 2.

    A attn 0-4, gate 4-5, shared 5-7 (dispatch 5-9); B attn 7-11; A experts 11-14 (combine
    14-19); B gate 14-15; A > 19, output 19-20; B shared 20-22 (dispatch 20-24); A2 attn 22-26;
    B experts 26-29 (combine 29-34); A2 gate 29-30; B > 34, output 34-35; A2 shared 35-37
    (dispatch 35-39); B2 attn 37-41; A2 experts 41-44 (combine 44-49); B2 gate 44-45; A2 > 49,
    output 49-50; B2 shared 50-52 (dispatch 50-54), > 54, experts 54-57 (combine 57-62), > 62,
    output 62-63.
    """
    assert len(stages("before", 0)) == 2 * 5
    assert step("before", 2) == 63


def test_step_time_with_the_placement_after_pr_6711() -> None:
    """Until A waits for its combine at 15, the same as before PR 6711.

    A > 19; B shared 19-21 (dispatch 19-23); A output and A2 attn 21-26; B experts 26-29 (combine
    29-34); A2 gate 29-30; B > 34; A2 shared 34-36 (dispatch 34-38); B output and B2 attn 36-41;
    A2 experts 41-44 (combine 44-49); B2 gate 44-45; A2 > 49; B2 shared 49-51 (dispatch 49-53);
    A2 output 51-52; B2 > 53, experts 53-56 (combine 56-61), > 61, output 61-62.
    """
    assert len(stages("after", 0)) == 2 * 6 - 1
    assert step("after", 2) == 62


def test_overlapped_batches_take_less_than_two_in_sequence() -> None:
    assert step("after", 2) < 2 * plain() == 72


# -- shared link and time-outs --------------------------------------------------------------------


def gather() -> Collective:
    """A blocking collective of three seconds."""
    return Collective("all_gather x", (0, 1), 1)


def test_blocking_collective_waits_for_an_asynchronous_one() -> None:
    # The link is busy from 2 to 7; then the gather takes three seconds.
    assert ends(gpu(2), begin("a", 5), gpu(1), gather(), gpu(3), Await("a")) == 2 + 5 + 3 + 3


def test_asynchronous_collective_waits_for_a_blocking_one() -> None:
    # The gather runs from 7 to 10; b starts after it.
    assert ends(begin("a", 1), gpu(7), gather(), begin("b", 5), gpu(2), Await("b")) == 7 + 3 + 5


def test_collective_that_others_begin_too_late_times_out() -> None:
    late: list[Op] = [gpu(1), Mark("phase", "x"), work(30), begin("a", 5), Await("a")]
    early: list[Op] = [gpu(1), Mark("phase", "x"), begin("a", 5), gpu(2), Await("a")]
    outcome = simulate(early, late, run_ahead=True, timeout=20.0)
    assert outcome.timeout is not None and outcome.longest_wait == 30
    assert (outcome.timeout.rank, outcome.timeout.operation) == (0, "a")
    assert (outcome.timeout.time, outcome.timeout.needed) == (21, 30)
    assert (outcome.timeout.waiting_for, outcome.timeout.busy_with) == (1, "compute compute")
    assert simulate(early, late, run_ahead=True, timeout=31.0).timeout is None
