"""From every rank's record to one Timeline."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from launch.gather import RankRecord, assemble, find_stalls
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV4_TINY
from runner.config.warmup import WarmupPolicy
from runner.scenario import Scenario
from runner.schedule import Compute, Mark
from runner.timeline import Span
from runner.watch.shim import CompileRecord

FORWARDS = [
    (10.0, "warm-up", "DECODE 1"),
    (20.0, "first request", "EXTEND 1"),
    (30.0, "requests", "EXTEND 8"),
    (40.0, "requests", "DECODE 8"),
]


def stalls(*starts: float) -> list[list[Any]]:
    records = [CompileRecord(start, start + 1, 0, 1, 0, "") for start in starts]
    return find_stalls(records, FORWARDS, [f"kernel {start:g}" for start in starts], 3)


def test_compiles_before_the_other_requests_are_no_stalls() -> None:
    assert stalls(5, 11, 25, 29.9) == []


def test_a_stall_belongs_to_the_forward_that_it_holds_up() -> None:
    assert stalls(15, 30, 39.5, 40, 99) == [
        [0, "EXTEND 8", 3, "kernel 30"],
        [0, "EXTEND 8", 3, "kernel 39.5"],
        [1, "DECODE 8", 3, "kernel 40"],
        [1, "DECODE 8", 3, "kernel 99"],
    ]


def test_without_requests_there_are_none() -> None:
    record = CompileRecord(50, 51, 0, 1, 0, "")
    assert find_stalls([record], FORWARDS[:2], ["kernel"], 0) == []


SCENARIO = Scenario(
    model=DSV4_TINY,
    parallel=ParallelConfig(pp=2, nodes=2),
    max_tokens=64,
    policy=WarmupPolicy.FAST,
    batch_sizes=(1,),
)
PROOFS = [{"node": 0, "planned": 4}, {"node": 1, "planned": 5}]


def made(**changes: Any) -> list[RankRecord]:
    zero = RankRecord(
        started=1000.0,
        spans=[Span(0, 1001.0, 1002.0, "load", "x")],
        ops=[Mark("phase", "end")],
        coverage=PROOFS[0],
        stalls=[[1, "DECODE 8", 0, "b"]],
    )
    one = RankRecord(
        started=999.5,
        spans=[Span(1, 999.0, 1003.5, "phase", "warm-up")],
        ops=[Compute("x", 1, 2)],
        coverage=PROOFS[1],
        stalls=[[0, "EXTEND 8", 1, "c"], [0, "EXTEND 8", 1, "a"]],
        **changes,
    )
    return [zero, one]


def test_the_origin_is_where_the_first_process_began() -> None:
    result = assemble(made(), SCENARIO, {"device": "cpu"})
    assert result.timeline.spans == (
        Span(0, 1.5, 2.5, "load", "x"),
        Span(1, 0.0, 4.0, "phase", "warm-up"),
    )
    assert result.schedule.ranks == ((Mark("phase", "end"),), (Compute("x", 1, 2),))
    assert (result.timeline.policy, result.timeline.source) == ("fast", "measured")
    assert result.timeline.world_size == 2


def test_what_the_timeline_tells() -> None:
    meta = assemble(made(), SCENARIO, {"device": "cpu"}).timeline.meta
    assert meta == {
        **SCENARIO.timeline_meta(),
        "device": "cpu",
        "walk_memory": None,
        "coverage": PROOFS,
        "stalls": [
            [0, "EXTEND 8", 1, "a"],
            [0, "EXTEND 8", 1, "c"],
            [1, "DECODE 8", 0, "b"],
        ],
    }


def test_only_leaders_prove_a_nodes_coverage() -> None:
    zero, one = made()
    record = RankRecord(one.started, one.spans, one.ops, coverage=None)
    meta = assemble([zero, record], SCENARIO, {}).timeline.meta
    assert meta["coverage"] == PROOFS[:1]


def test_the_least_memory_that_any_walk_had() -> None:
    zero, one = made(walk_memory=5e9)
    assert assemble([zero, one], SCENARIO, {}).timeline.meta["walk_memory"] == 5e9
    less = RankRecord(zero.started, zero.spans, zero.ops, None, walk_memory=3e9)
    assert assemble([less, one], SCENARIO, {}).timeline.meta["walk_memory"] == 3e9
