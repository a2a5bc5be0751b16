"""Which policy to take, and why."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from runner.timeline import FIRST_REQUEST, Span, Timeline
from sim.advice import advice_table, advise, print_predictions
from sim.culprit import CollectiveTimeout
from sim.simulate import Prediction
from sim.start_up import StartPhases
from tests.unit.tiny_runs import h200, machine

LOST = CollectiveTimeout(120.4, 6, "recv hidden_states", 2, "compile gemm", 700.2)
META: dict[str, Any] = {
    "model": "a-model", "layers": 3, "pp": 4, "tp": 2, "replicas": 1, "nodes": 4,
    "cores_per_node": 16, "batch_sizes": [1, 128, 1024], "stream": None,
    "coverage_up": [{"present": 10, "planned": 10}, {"present": 3, "planned": 12}],
}  # fmt: skip


def prediction(policy: str, up: float, stalls: int = 0, **changes: Any) -> Prediction:
    """Up at ``up``, all served 10 s later; 2 s of compiling a stall."""
    spans = (
        Span(0, 0.0, 3.0, "compile", "gemm", "a"),
        Span(0, 3.0, 4.0, "compile", "gemm", "a"),
        Span(0, 0.0, up, "phase", FIRST_REQUEST),
        Span(0, up, up + 10, "phase", "requests"),
    )
    made = Prediction(
        Timeline(policy, "predicted", 1, spans, META), None, longest_wait=17.25, stalls=stalls,
        stall_seconds=2.0 * stalls,
    )  # fmt: skip
    return replace(made, **changes)


def advised(*predictions: Prediction) -> tuple[str, str]:
    advice = advise(predictions)
    return advice.prediction.timeline.policy, advice.reason


def test_the_fewest_stalls_and_the_fastest_are_one() -> None:
    assert advised(prediction("none", 90, 40), prediction("planned", 20)) == (
        "planned", "survives its longest wait, leaves no kernel to compile in traffic",
    )  # fmt: skip


def test_what_is_up_sooner_and_stalls_more_is_named() -> None:
    assert advised(prediction("pp-parallel", 15.4, 40), prediction("planned", 20)) == (
        "planned",
        "survives its longest wait, leaves no kernel to compile in traffic; "
        "pp-parallel is up after 15 s and leaves 40 kernels (80 s) to compile in traffic",
    )


def test_with_as_many_stalls_the_fastest() -> None:
    assert advised(prediction("full", 30, 4), prediction("fast", 20, 4)) == (
        "fast", "survives its longest wait, leaves 4 kernels (8 s) to compile in traffic",
    )  # fmt: skip


def test_of_those_that_are_the_same_the_first() -> None:
    policy, reason = advised(prediction("full", 20), prediction("relax", 20))
    assert policy == "full"
    assert reason == "survives its longest wait, leaves no kernel to compile in traffic"


def test_up_at_the_same_time_the_one_without_stalls_is_no_other_choice() -> None:
    assert advised(prediction("none", 20, 7), prediction("planned", 20)) == (
        "planned", "survives its longest wait, leaves no kernel to compile in traffic",
    )  # fmt: skip


def test_who_dies_is_not_taken() -> None:
    dying = prediction("planned", 5, timeout=LOST)
    assert advised(dying, prediction("none", 90, 40)) == (
        "none", "survives its longest wait, leaves 40 kernels (80 s) to compile in traffic",
    )  # fmt: skip


def test_where_all_die_the_best_of_them() -> None:
    all_die = [prediction("none", 90, 40, timeout=LOST), prediction("fast", 30, 4, timeout=LOST)]
    assert advised(*all_die) == (
        "fast", "no policy survives; leaves 4 kernels (8 s) to compile in traffic",
    )  # fmt: skip


def test_prebuilt_is_only_taken_where_there_is_nothing_else() -> None:
    prebuilt = prediction("prebuilt", 2)
    assert advised(prebuilt, prediction("planned", 20))[0] == "planned"
    assert advised(prebuilt)[0] == "prebuilt"
    assert advised(prebuilt, prediction("none", 90, 40, timeout=LOST))[0] == "prebuilt"


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


def shown(capsys: pytest.CaptureFixture[str], *predictions: Prediction, **where: Any) -> list[str]:
    print_predictions(predictions, machine(**where), bars=False)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_all_that_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(
        capsys, prediction("none", 90, 40, timeout=LOST), prediction("planned", 20),
        start=StartPhases(),
    )  # fmt: skip
    assert lines[:3] == [
        "a-model, 3 layers: pp 4 x tp 2 on 4 node(s), h200, 16 cores a node",
        "cold caches; first request 1, then 128,1024",
        "before the warm-up: imports, process group, weights",
    ]
    assert lines[-3:] == [
        "none: the watchdog ends this run at 120 s: rank 6 waits for rank 2 in recv hidden_states "
        "while that",
        "does compile gemm; --nccl-timeout 701 would survive",
        "take planned: it survives its longest wait, leaves no kernel to compile in traffic",
    ]


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
