"""Results of a run: one Timeline assembled from all ranks' records, and the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from launch.gather import Logits, RankRecord, assemble, find_stalls
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV4_TINY
from runner.config.warmup import WarmupPolicy
from runner.errors import UserError
from runner.scenario import Scenario
from runner.schedule import Compute, Mark
from runner.timeline import Span


def test_stall_is_a_compile_attributed_to_the_forward_it_delays() -> None:
    served = [(30.0, "EXTEND 8"), (40.0, "DECODE 8")]
    spans = [
        Span(3, start, start + 1, "compile", "gemm", f"kernel {start:g}")
        for start in (5, 29.9, 30, 39.5, 40, 99)
    ]
    spans.append(Span(3, 50, 51, "load", "gemm", ""))
    assert find_stalls(spans, served) == [
        [0, "EXTEND 8", 3, "kernel 30"],
        [0, "EXTEND 8", 3, "kernel 39.5"],
        [1, "DECODE 8", 3, "kernel 40"],
        [1, "DECODE 8", 3, "kernel 99"],
    ]
    assert find_stalls(spans, []) == []


SCENARIO = Scenario(
    model=DSV4_TINY,
    parallel=ParallelConfig(pp=2, nodes=2),
    max_tokens=64,
    policy=WarmupPolicy.FAST,
    batch_sizes=(1,),
)
COVERAGE = [{"node": 0, "planned": 4}, {"node": 1, "planned": 5}]


def made(**changes: Any) -> list[RankRecord]:
    zero = RankRecord(
        started=1000.0,
        spans=[Span(0, 1001.0, 1002.0, "load", "x")],
        ops=[Mark("phase", "end")],
        coverage=COVERAGE[0],
        stalls=[[1, "DECODE 8", 0, "b"]],
    )
    one = RankRecord(
        started=999.5,
        spans=[Span(1, 999.0, 1003.5, "phase", "warm-up")],
        ops=[Compute("x", 1, 2)],
        coverage=COVERAGE[1],
        stalls=[[0, "EXTEND 8", 1, "c"], [0, "EXTEND 8", 1, "a"]],
        **changes,
    )
    return [zero, one]


def test_assembled_timeline_starts_with_the_first_process() -> None:
    result = assemble(made(), SCENARIO, {"device": "cpu"})
    assert result.timeline.spans == (
        Span(0, 1.5, 2.5, "load", "x"),
        Span(1, 0.0, 4.0, "phase", "warm-up"),
    )
    assert result.schedule.ranks == ((Mark("phase", "end"),), (Compute("x", 1, 2),))
    assert (result.timeline.policy, result.timeline.source) == ("fast", "measured")
    assert result.timeline.world_size == 2


def test_metadata_holds_scenario_coverage_and_stalls() -> None:
    meta = assemble(made(), SCENARIO, {"device": "cpu"}).timeline.meta
    assert meta == {
        **SCENARIO.timeline_meta(),
        "device": "cpu",
        "walk_memory": None,
        "coverage": COVERAGE,
        "stalls": [
            [0, "EXTEND 8", 1, "a"],
            [0, "EXTEND 8", 1, "c"],
            [1, "DECODE 8", 0, "b"],
        ],
    }


def test_coverage_comes_from_node_leaders_only() -> None:
    zero, one = made()
    record = RankRecord(one.started, one.spans, one.ops, coverage=None)
    meta = assemble([zero, record], SCENARIO, {}).timeline.meta
    assert meta["coverage"] == COVERAGE[:1]


def test_metadata_holds_the_smallest_walk_memory_of_any_rank() -> None:
    zero, one = made(walk_memory=5e9)
    assert assemble([zero, one], SCENARIO, {}).timeline.meta["walk_memory"] == 5e9
    less = RankRecord(zero.started, zero.spans, zero.ops, None, walk_memory=3e9)
    assert assemble([less, one], SCENARIO, {}).timeline.meta["walk_memory"] == 3e9


# -- logits ---------------------------------------------------------------------------------------

MADE = torch.tensor([[1.0, -2.5]], dtype=torch.bfloat16)


def test_first_rank_of_last_stage_writes_logits_as_fp32(
    tmp_path: Path,
) -> None:
    for rank in range(4):
        logits = Logits(tmp_path / f"{rank}.pt", ParallelConfig(pp=2, tp=2), rank)
        for made in (MADE, "shapes alone", None, -MADE):
            logits.keep(made)
        logits.save()
    assert list(tmp_path.iterdir()) == [tmp_path / "2.pt"]
    first, second = torch.load(tmp_path / "2.pt")
    assert torch.equal(first, MADE.float()) and torch.equal(second, -MADE.float())
    assert first.dtype == torch.float32


def test_no_file_is_written_without_logits_or_path(tmp_path: Path) -> None:
    Logits(tmp_path / "x.pt", ParallelConfig(), 0).save()
    nowhere = Logits(None, ParallelConfig(), 0)
    nowhere.keep(MADE)
    nowhere.save()
    assert not list(tmp_path.iterdir())


def test_unwritable_logits_path_is_a_one_line_error(tmp_path: Path) -> None:
    logits = Logits(tmp_path / "none" / "x.pt", ParallelConfig(), 0)
    logits.keep(MADE)
    with pytest.raises(UserError, match=r"cannot write .*none/x\.pt"):
        logits.save()
