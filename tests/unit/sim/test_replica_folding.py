"""Folding: simulating one replica gives the same result as simulating all."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from runner.config.parallel import ParallelConfig
from runner.config.warmup import WarmupPolicy
from runner.scenario import Scenario
from sim.costs.start_up import StartPhases
from sim.engine.engine import Outcome
from sim.engine.replica_folding import can_fold, unfold
from sim.simulate import Prediction, simulate
from tests.unit.tiny_runs import machine, scenario


def comparable(prediction: Prediction) -> list[Any]:
    """A prediction as comparable values; keys of communication only number the messages."""
    spans = sorted(
        (
            s.rank,
            round(s.start, 9),
            round(s.end, 9),
            s.kind,
            s.name,
            "" if s.kind in ("comm", "wait") else s.key,
        )
        for s in prediction.timeline.spans
    )
    timeline = prediction.timeline
    lost = prediction.timeout
    return [
        spans,
        timeline.meta,
        timeline.wall,
        timeline.up,
        timeline.world_size,
        lost,
        prediction.longest_wait,
        prediction.stalls,
        prediction.stall_seconds,
    ]


def assert_folds(one: Scenario, **machine_values: Any) -> None:
    folded, whole = (simulate(one, machine(fold=fold, **machine_values)) for fold in (True, False))
    for a, b in zip(comparable(folded), comparable(whole), strict=True):
        assert a == b


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("policy", WarmupPolicy, ids=lambda policy: policy.value)
def test_folded_run_equals_the_whole_run(policy: WarmupPolicy, replicas: int) -> None:
    for nodes, ahead in product((replicas, 2 * replicas), (False, True)):
        one = scenario(policy, pp=2, tp=2, replicas=replicas, nodes=nodes)
        assert_folds(one, run_ahead=ahead)


LAYOUT = {"pp": 2, "tp": 2, "replicas": 2, "nodes": 4}


@pytest.mark.parametrize("policy", [WarmupPolicy.PP_PARALLEL_FAST, WarmupPolicy.PLANNED])
@pytest.mark.parametrize(
    ("values", "on"),
    [
        ({"compile_lock": True, "nodes": 2}, {}),
        ({"graph_batch_sizes": (1, 8), "stream": (7, 64, 3)}, {"run_ahead": True}),
        ({"ep": True, "attn_cp": 2}, {}),
        ({}, {"nccl_timeout": 1.0}),
        ({}, {"nccl_timeout": 1.0, "run_ahead": True}),
        ({}, {"start": StartPhases()}),
        ({}, {"hosts": 2, "cores_per_node": 3}),
    ],
    ids=["lock", "graphs", "split", "dies", "dies-ahead", "start-up", "hosts"],
)
def test_folded_run_equals_the_whole_run_with_other_options(
    policy: WarmupPolicy, values: dict[str, Any], on: dict[str, Any]
) -> None:
    assert_folds(scenario(policy, **{**LAYOUT, **values}), **on)


def test_replicas_that_share_a_host_are_not_folded() -> None:
    """They share cores, so their compiles slow each other down."""
    one = scenario(WarmupPolicy.NONE, **LAYOUT)
    assert_folds(one, hosts=1, cores_per_node=2)
    alone = simulate(one, machine(cores_per_node=2)).timeline
    assert simulate(one, machine(hosts=1, cores_per_node=2)).timeline.wall > 1.5 * alone.wall


def test_folded_run_simulates_only_one_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def seeing(outcome: Outcome, parallel: ParallelConfig) -> Outcome:
        seen.append({span.rank for span in outcome.spans})
        return unfold(outcome, parallel)

    monkeypatch.setattr("sim.simulate.unfold", seeing)
    simulate(scenario(WarmupPolicy.NONE, **LAYOUT), machine())
    simulate(scenario(WarmupPolicy.NONE, **LAYOUT), machine(fold=False))
    simulate(scenario(WarmupPolicy.NONE, pp=2, tp=2), machine())
    assert seen == [{0, 1, 2, 3}]


def test_can_fold_requires_replicas_on_separate_nodes_and_hosts() -> None:
    def folds(replicas: int, nodes: int, hosts: int) -> bool:
        return can_fold(ParallelConfig(pp=2, tp=2, replicas=replicas, nodes=nodes), hosts)

    assert folds(2, 2, 2) and folds(2, 4, 4) and folds(2, 4, 2) and folds(3, 6, 3)
    assert not folds(1, 2, 2), "there is nothing to fold"
    assert not folds(2, 1, 1), "a node of two replicas"
    assert not folds(2, 4, 1), "a host of two replicas"
    assert not folds(3, 4, 4), "a node of parts of two replicas"


def test_unfold_refuses_replicas_that_end_at_different_times() -> None:
    outcome = Outcome([], None, {}, 0.0, (9.0, 5.0, 6.0))
    with pytest.raises(AssertionError, match=r"part at different times: \[5.0, 6.0\]"):
        unfold(outcome, ParallelConfig(replicas=3, nodes=3))
