"""Which policy to take, and why."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from runner.report.predictions import advice_table, advise, print_predictions
from runner.timeline import FIRST_REQUEST, Span, Timeline
from sim.costs.start_up import StartPhases
from sim.engine.timeout_diagnosis import CollectiveTimeout
from sim.simulate import Prediction
from tests.unit.tiny_runs import h200, machine

LOST = CollectiveTimeout(120.4, 6, "recv hidden_states", 2, "compile gemm", 700.2)
META: dict[str, Any] = {
    "model": "a-model",
    "layers": 3,
    "pp": 4,
    "tp": 2,
    "replicas": 1,
    "nodes": 4,
    "hosts": 4,
    "cores_per_node": 16,
    "batch_sizes": [1, 128, 1024],
    "stream": None,
    "ranks": [{"node": 0}],
    "coverage_up": [{"present": 10, "planned": 10}, {"present": 3, "planned": 12}],
}


def prediction(policy: str, up: float, stalls: int = 0, **changes: Any) -> Prediction:
    """Up at ``up``, all served 10 s later; 2 s of compiling a stall."""
    spans = (
        Span(0, 0.0, 3.0, "compile", "gemm", "a"),
        Span(0, 3.0, 4.0, "compile", "gemm", "a"),
        Span(0, 0.0, up, "phase", FIRST_REQUEST),
        Span(0, up, up + 10, "phase", "requests"),
    )
    made = Prediction(
        Timeline(policy, "predicted", 1, spans, META),
        None,
        longest_wait=17.25,
        stalls=stalls,
        stall_seconds=2.0 * stalls,
    )
    return replace(made, **changes)


def advised(*predictions: Prediction) -> tuple[str, str]:
    advice = advise(predictions)
    return advice.prediction.timeline.policy, advice.reason


NOTHING = "no kernel to compile in traffic"


def test_it_says_when_it_is_up_and_what_it_leaves() -> None:
    assert advised(prediction("none", 90, 40), prediction("planned", 20)) == (
        "planned",
        f"up after 20 s; leaves {NOTHING}",
    )


def test_stalls_are_weighed_against_the_start_up() -> None:
    """30 s and 4 s of stalls are less than 35 s, and 30 s and 6 s are more."""
    planned = prediction("planned", 35)
    assert advised(prediction("fast", 30, 2), planned) == (
        "fast",
        "up after 30 s; leaves 2 kernels (4 s) to compile in traffic",
    )
    assert advised(prediction("fast", 30, 3), planned) == (
        "planned",
        f"up after 35 s; leaves {NOTHING}; "
        "fast is up sooner, after 30 s, but leaves 3 kernels (6 s) to compile in traffic",
    )


def test_it_is_seconds_of_stalls_that_count_and_not_their_number() -> None:
    few = prediction("few", 20, 1, stall_seconds=30.0)
    assert advised(few, prediction("many", 20, 9, stall_seconds=10.0)) == (
        "many",
        "up after 20 s; leaves 9 kernels (10 s) to compile in traffic",
    )


def test_a_policy_is_named_once() -> None:
    """The best without a built cache is also the one that is up soonest."""
    prebuilt, fast = prediction("prebuilt", 30), prediction("fast", 20, 10)
    assert advised(prebuilt, fast) == (
        "prebuilt",
        f"up after 30 s; leaves {NOTHING}; wants a cache that was built beforehand; without one "
        "take fast: up after 20 s, leaves 10 kernels (20 s) to compile in traffic",
    )


def test_what_is_up_sooner_and_stalls_more_is_named() -> None:
    assert advised(prediction("pp-parallel", 15.4, 40), prediction("planned", 20)) == (
        "planned",
        f"up after 20 s; leaves {NOTHING}; "
        "pp-parallel is up sooner, after 15 s, but leaves 40 kernels (80 s) to compile in traffic",
    )


def test_with_as_many_stalls_the_fastest() -> None:
    assert advised(prediction("full", 30, 4), prediction("fast", 20, 4)) == (
        "fast",
        "up after 20 s; leaves 4 kernels (8 s) to compile in traffic",
    )


def test_of_what_takes_as_long_together_what_is_up_first() -> None:
    """20 s and 10 s of stalls are 30 s."""
    assert advised(prediction("planned", 30), prediction("fast", 20, 5)) == (
        "fast",
        "up after 20 s; leaves 5 kernels (10 s) to compile in traffic",
    )


def test_of_those_that_are_the_same_the_first() -> None:
    assert advised(prediction("full", 20), prediction("relax", 20)) == (
        "full",
        f"up after 20 s; leaves {NOTHING}",
    )


def test_who_is_up_at_the_same_time_is_not_up_sooner() -> None:
    planned = ("planned", f"up after 20 s; leaves {NOTHING}")
    assert advised(prediction("none", 20, 7), prediction("planned", 20)) == planned
    # Fewer kernels, though they take longer.
    fewer = prediction("fewer", 20, 1, stall_seconds=9.0)
    assert advised(fewer, prediction("more", 20, 2)) == (
        "more",
        "up after 20 s; leaves 2 kernels (4 s) to compile in traffic",
    )


def test_who_dies_is_not_taken() -> None:
    dying = prediction("planned", 5, timeout=LOST)
    assert advised(dying, prediction("none", 90, 40)) == (
        "none",
        "up after 90 s; leaves 40 kernels (80 s) to compile in traffic",
    )


def test_where_all_die_the_best_of_them() -> None:
    all_die = [prediction("none", 90, 40, timeout=LOST), prediction("fast", 30, 4, timeout=LOST)]
    assert advised(*all_die) == (
        "fast",
        "no policy survives its longest wait: raise --nccl-timeout; "
        "up after 30 s; leaves 4 kernels (8 s) to compile in traffic",
    )


def test_no_option_raises_the_limit_of_hosts() -> None:
    lost = replace(LOST, of_hosts=True)
    all_die = [prediction("none", 90, 40, timeout=LOST), prediction("fast", 30, 4, timeout=lost)]
    assert advised(*all_die)[1].startswith("no policy survives its longest wait; up after 30 s;")


def test_prebuilt_wants_a_cache_so_the_best_other_is_named() -> None:
    """The next best by time in all: 20 s, not 15 s and 80 s of stalls."""
    prebuilt, planned = prediction("prebuilt", 2), prediction("planned", 20)
    quick = prediction("pp-parallel", 15, 40)
    assert advised(quick, prebuilt, planned) == (
        "prebuilt",
        f"up after 2 s; leaves {NOTHING}; wants a cache that was built beforehand; without one "
        f"take planned: up after 20 s, leaves {NOTHING}",
    )


def test_prebuilt_where_nothing_else_survives() -> None:
    prebuilt = prediction("prebuilt", 2)
    alone = ("prebuilt", f"up after 2 s; leaves {NOTHING}")
    assert advised(prebuilt) == alone
    assert advised(prebuilt, prediction("none", 1, timeout=LOST)) == alone


def test_prebuilt_is_not_taken_where_another_is_better() -> None:
    planned = prediction("planned", 20)
    alone = ("planned", f"up after 20 s; leaves {NOTHING}")
    assert advised(prediction("prebuilt", 21), planned) == alone
    assert advised(prediction("prebuilt", 2, timeout=LOST), planned) == alone


# -- what is shown --------------------------------------------------------------------------------


def rows_of(*predictions: Prediction) -> list[str]:
    out = StringIO()
    Console(width=100, force_terminal=False, file=out).print(advice_table(predictions))
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def test_a_policy_is_a_row() -> None:
    rows = rows_of(prediction("planned", 20), prediction("none", 90.06, 40, timeout=LOST))
    # The worst node has 3 of 12 kernels: a quarter.
    assert "planned 20.0 30.0 2 1 4 25% 0 0 17.2 -" in rows
    assert "none 90.1 100.1 2 1 4 25% 40 80 17.2 120" in rows


@pytest.mark.parametrize(
    ("up", "told"),
    [
        (100.0, "100.0 110.0"),
        (110.4, "110.4 120.4"),
        (110.5, "110.5 (120.5)"),
        (120.4, "120.4 (130.4)"),
        (120.5, "(120.5) (130.5)"),
    ],
)
def test_times_after_a_death_are_in_brackets(up: float, told: str) -> None:
    """It dies at 120.4 s; all is served 10 s after it is up."""
    assert f"none {told} 2 1 4 25% 0 0 17.2 120" in rows_of(prediction("none", up, timeout=LOST))
    alive = told.replace("(", "").replace(")", "")
    assert f"none {alive} 2 1 4 25% 0 0 17.2 -" in rows_of(prediction("none", up))


def test_cpu_seconds_are_of_cores() -> None:
    """Two compiles at a time on one core take what one takes."""
    one = prediction("none", 20)
    spans = tuple(replace(span, start=0.0) for span in one.timeline.spans)
    for cores, seconds in ((1, 4), (2, 7)):
        meta = {**META, "cores_per_node": cores}
        crowded = replace(one, timeline=replace(one.timeline, spans=spans, meta=meta))
        assert f"none 20.0 30.0 2 1 {seconds} 25% 0 0 17.2 -" in rows_of(crowded)


def shown(capsys: pytest.CaptureFixture[str], *predictions: Prediction, **where: Any) -> list[str]:
    print_predictions(predictions, machine(**where), "of a library", bars=False)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_all_that_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(
        capsys,
        prediction("none", 90, 40, timeout=LOST),
        prediction("planned", 20),
        start=StartPhases(),
    )
    assert lines[:6] == [
        "a-model, 3 layers: pp 4 x tp 2 on 4 node(s), h200, 16 cores a node",
        "cold caches; first request 1, then 128,1024",
        "before the warm-up: imports, process group, weights",
        "kernels: of a library",
        "predictions of h200 were within 13% (median), 33% (worst) of 25 measured runs",
        "",
    ]
    assert lines[-3:] == [
        "none: the watchdog ends this run at 120 s: rank 6 waits for rank 2 in recv hidden_states "
        "while that",
        "does compile gemm; --nccl-timeout 701 would survive",
        "take planned: up after 20 s; leaves no kernel to compile in traffic",
    ]


def test_a_death_at_the_limit_of_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    lost = replace(LOST, time=7210.0, operation="barrier", of_hosts=True)
    assert " ".join(shown(capsys, prediction("none", 9000, timeout=lost))[-2:]) == (
        "none: its hosts' limit ends this run at 7210 s: rank 6 waits for rank 2 in barrier while "
        "that does compile gemm; its hosts would have to wait 701 s"
    )


def test_nodes_that_share_a_machine_share_its_cores(capsys: pytest.CaptureFixture[str]) -> None:
    one = prediction("none", 9)
    shared = replace(one, timeline=replace(one.timeline, meta={**META, "hosts": 2}))
    title = shown(capsys, shared)[0]
    assert title.endswith("on 4 node(s), h200, 16 cores for each 2 nodes")


def test_one_policy_needs_no_advice(capsys: pytest.CaptureFixture[str]) -> None:
    assert not [line for line in shown(capsys, prediction("none", 9)) if line.startswith("take")]


def test_copies_streams_and_estimates_are_in_the_title(capsys: pytest.CaptureFixture[str]) -> None:
    one = prediction("none", 9)
    meta = {**META, "replicas": 3, "stream": [77, 5]}
    one = replace(one, timeline=replace(one.timeline, meta=meta))
    lines = shown(capsys, one, profile=replace(h200(), estimate=True))
    assert lines[:3] == [
        "a-model, 3 layers: 3 x pp 4 x tp 2 on 4 node(s), h200 (an estimate from public figures), "
        "16 cores a node",
        "cold caches; first request 1, then 77,5",
        "before the warm-up: none",
    ]
    only_first = replace(one, timeline=replace(one.timeline, meta={**META, "batch_sizes": [8]}))
    assert shown(capsys, only_first)[1] == "cold caches; first request 8, then none"
