"""What runs of all policies on an H200 recorded, against what is foretold without a clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.scenario import record
from runner.stalls import stalls_of
from runner.timeline import Timeline, read_timelines
from runner.warmup import WarmupPolicy
from sim.judge import judge, scenario_of
from sim.profile import load_profile

RUNS = read_timelines(Path(__file__).parents[2] / "docs" / "measurements" / "h200_policies.json")
STREAMS = [timeline for timeline in RUNS if timeline.meta["stream"]]

RACES = {("dsv3", "pp-parallel", 58), ("dsv4", "full", 87)}
"""Runs in which two ranks come to one kernel at nearly the same time; see docs/predictions.md."""


@pytest.mark.parametrize("timeline", STREAMS, ids=lambda timeline: timeline.policy)
def test_the_stalls_that_were_recorded_are_those_foretold(timeline: Timeline) -> None:
    scenario = scenario_of(timeline)
    node_of = scenario.parallel.node_of
    recorded = {(i, name, node_of(rank), key) for i, name, rank, key in timeline.meta["stalls"]}
    foretold = {(s.forward, s.name, s.node, s.kernel) for s in stalls_of(record(scenario), node_of)}
    if scenario.warmup.policy in (WarmupPolicy.PLANNED, WarmupPolicy.PREBUILT):
        assert recorded == set()
    else:
        assert recorded == foretold and recorded


def test_every_policy_was_followed_by_a_stream() -> None:
    assert {timeline.policy for timeline in STREAMS} == {policy.value for policy in WarmupPolicy}


def test_compiles_and_duplicates_are_exact_but_in_races() -> None:
    differ = {
        (item.measured.meta["model"], item.measured.policy, item.measured.kernels_compiled)
        for item in judge(RUNS, load_profile("h200"))
        if not item.counts_agree
    }
    assert differ <= RACES
