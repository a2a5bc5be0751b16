"""The recommended policy and its reason, and printed predictions."""

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
    """Up at ``up``, all requests served 10 s later; each stall is 2 s of compiling."""
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


def with_meta(one: Prediction, **changes: Any) -> Prediction:
    return replace(one, timeline=replace(one.timeline, meta={**META, **changes}))


def stalls(kernels: int, seconds: int) -> str:
    return f"{kernels} kernels ({seconds} s) to compile in traffic"


NOTHING = "no kernel to compile in traffic"
PLANNED_20 = f"up after 20 s; leaves {NOTHING}"
SOONER = {
    "pp-parallel": f"pp-parallel is up sooner, after 15 s, but leaves {stalls(40, 80)}",
    "fast": f"fast is up sooner, after 30 s, but leaves {stalls(3, 6)}",
}
PREBUILT = f"up after 2 s; leaves {NOTHING}"
NO_SURVIVOR = "no policy survives its longest wait"


@pytest.mark.parametrize(
    ("predictions", "policy", "reason"),
    [
        # A second of stall counts like a second of start-up; the number of stalls does not.
        ([("none", 90, 40), ("planned", 20)], "planned", PLANNED_20),
        ([("fast", 30, 2), ("planned", 35)], "fast", f"up after 30 s; leaves {stalls(2, 4)}"),
        (
            [("fast", 30, 3), ("planned", 35)],
            "planned",
            f"up after 35 s; leaves {NOTHING}; {SOONER['fast']}",
        ),
        ([("full", 30, 4), ("fast", 20, 4)], "fast", f"up after 20 s; leaves {stalls(4, 8)}"),
        # Ties go to the policy that is up first, then to the first one given.
        ([("planned", 30), ("fast", 20, 5)], "fast", f"up after 20 s; leaves {stalls(5, 10)}"),
        ([("full", 20), ("relax", 20)], "full", PLANNED_20),
        # Policies that are up sooner are named, those up at the same time are not.
        (
            [("pp-parallel", 15.4, 40), ("planned", 20)],
            "planned",
            f"{PLANNED_20}; {SOONER['pp-parallel']}",
        ),
        ([("none", 20, 7), ("planned", 20)], "planned", PLANNED_20),
        # prebuilt needs a cache, so the best other policy is named too, once.
        (
            [("prebuilt", 30), ("fast", 20, 10)],
            "prebuilt",
            f"up after 30 s; leaves {NOTHING}; needs a prebuilt cache; without one use fast: "
            f"up after 20 s, leaves {stalls(10, 20)}",
        ),
        (
            [("pp-parallel", 15, 40), ("prebuilt", 2), ("planned", 20)],
            "prebuilt",
            f"{PREBUILT}; needs a prebuilt cache; without one use planned: "
            f"up after 20 s, leaves {NOTHING}",
        ),
        ([("prebuilt", 2)], "prebuilt", PREBUILT),
        ([("prebuilt", 21), ("planned", 20)], "planned", PLANNED_20),
    ],
)
def test_advice_names_best_policy_and_reason(
    predictions: list[tuple[Any, ...]], policy: str, reason: str
) -> None:
    best, why = advise([prediction(*one) for one in predictions])
    assert (best.timeline.policy, why) == (policy, reason)


def test_advice_weighs_stall_seconds_not_stall_count() -> None:
    few, many = (prediction("a", 20, 1, stall_seconds=30.0), prediction("b", 20, 9))
    best, why = advise([few, replace(many, stall_seconds=10.0)])
    assert (best.timeline.policy, why) == ("b", f"up after 20 s; leaves {stalls(9, 10)}")
    # Up at the same time is not up sooner, even with fewer kernels.
    fewer = prediction("fewer", 20, 1, stall_seconds=9.0)
    assert advise([fewer, prediction("more", 20, 2)])[1] == f"up after 20 s; leaves {stalls(2, 4)}"


@pytest.mark.parametrize(
    ("dying", "alive", "policy", "reason"),
    [
        (["planned", 5], ["none", 90, 40], "none", f"up after 90 s; leaves {stalls(40, 80)}"),
        (["none", 1], ["prebuilt", 2], "prebuilt", PREBUILT),
        (["prebuilt", 2], ["planned", 20], "planned", PLANNED_20),
    ],
)
def test_policy_that_times_out_is_not_advised(
    dying: list[Any], alive: list[Any], policy: str, reason: str
) -> None:
    best, why = advise([prediction(*dying, timeout=LOST), prediction(*alive)])
    assert (best.timeline.policy, why) == (policy, reason)


@pytest.mark.parametrize(
    ("of_hosts", "start"),
    [(False, f"{NO_SURVIVOR}: raise --nccl-timeout; "), (True, f"{NO_SURVIVOR}; ")],
)
def test_if_all_policies_time_out_the_best_is_advised_with_a_warning(
    of_hosts: bool, start: str
) -> None:
    lost = replace(LOST, of_hosts=of_hosts)  # No option raises the hosts' limit.
    best, why = advise(
        [prediction("none", 90, 40, timeout=LOST), prediction("fast", 30, 4, timeout=lost)]
    )
    assert best.timeline.policy == "fast"
    assert why == f"{start}up after 30 s; leaves {stalls(4, 8)}"


# -- printed output -------------------------------------------------------------------------------


def rows_of(*predictions: Prediction) -> list[str]:
    out = StringIO()
    Console(width=100, force_terminal=False, file=out).print(advice_table(predictions))
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def test_table_has_one_row_per_policy() -> None:
    rows = rows_of(prediction("planned", 20), prediction("none", 90.06, 40, timeout=LOST))
    # The worst node has 3 of 12 kernels: a quarter.
    assert "planned 20.0 30.0 2 1 4 25% 0 0 17.2 -" in rows
    assert "none 90.1 100.1 2 1 4 25% 40 80 17.2 120" in rows


@pytest.mark.parametrize(
    ("up", "shown"),
    [
        (100.0, "100.0 110.0"),
        (110.5, "110.5 (120.5)"),
        (120.4, "120.4 (130.4)"),
        (120.5, "(120.5) (130.5)"),
    ],
)
def test_times_after_the_timeout_are_in_parentheses(up: float, shown: str) -> None:
    """The run times out at 120.4 s; all requests are served 10 s after it is up."""
    assert f"none {shown} 2 1 4 25% 0 0 17.2 120" in rows_of(prediction("none", up, timeout=LOST))
    alive = shown.replace("(", "").replace(")", "")
    assert f"none {alive} 2 1 4 25% 0 0 17.2 -" in rows_of(prediction("none", up))


def printed(
    capsys: pytest.CaptureFixture[str], *predictions: Prediction, **where: Any
) -> list[str]:
    print_predictions(predictions, machine(**where), "of a library", bars=False)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_output_has_title_validation_timeout_and_advice(capsys: pytest.CaptureFixture[str]) -> None:
    both = prediction("none", 90, 40, timeout=LOST), prediction("planned", 20)
    lines = printed(capsys, *both, start=StartPhases())
    assert lines[:6] == [
        "a-model, 3 layers: pp 4 x tp 2 on 4 nodes, h200, 16 cores a node",
        "cold caches; first request 1, then 128,1024",
        "before the warm-up: imports, process group, weights",
        "kernels: of a library",
        "errors of profile h200 on 25 measured runs: 13% (median), 33% (worst)",
        "",
    ]
    assert lines[-3:] == [
        "none: the watchdog ends this run at 120 s: rank 6 waits for rank 2 in recv hidden_states "
        "while that",
        "does compile gemm; --nccl-timeout 701 would survive",
        "use planned: up after 20 s; leaves no kernel to compile in traffic",
    ]


def test_output_of_a_timeout_at_the_hosts_limit(capsys: pytest.CaptureFixture[str]) -> None:
    lost = replace(LOST, time=7210.0, operation="barrier", of_hosts=True)
    assert " ".join(printed(capsys, prediction("none", 9000, timeout=lost))[-2:]) == (
        "none: its hosts' limit ends this run at 7210 s: rank 6 waits for rank 2 in barrier while "
        "that does compile gemm; its hosts would have to wait 701 s"
    )


def test_single_policy_gets_no_advice(capsys: pytest.CaptureFixture[str]) -> None:
    assert not [line for line in printed(capsys, prediction("none", 9)) if line.startswith("take")]


def test_title_names_shared_hosts_estimates_replicas_and_requests(
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = prediction("none", 9)
    shared = printed(capsys, with_meta(one, hosts=2))[0]
    assert shared.endswith("on 4 nodes, h200, 16 cores for each 2 nodes")
    estimate = replace(h200(), estimate=True)
    several = with_meta(one, replicas=3, stream=[77, 5])
    assert printed(capsys, several, profile=estimate)[:3] == [
        "a-model, 3 layers: 3 x pp 4 x tp 2 on 4 nodes, h200 (an estimate from public figures), "
        "16 cores a node",
        "cold caches; first request 1, then 77,5",
        "before the warm-up: none",
    ]
    only_first = printed(capsys, with_meta(one, batch_sizes=[8]))
    assert only_first[1] == "cold caches; first request 8, then none"
