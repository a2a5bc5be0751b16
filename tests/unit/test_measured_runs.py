"""Runs measured on H200s (docs/measurements), against predictions of the shipped profile."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest

from runner.config.warmup import WarmupPolicy
from runner.driver.run import record
from runner.planning.plan import table_of
from runner.planning.residency import kernels_at_start, stalls_of
from runner.schedule import Collective
from runner.timeline import Timeline, read_timelines
from sim.calibration.run_metadata import read_metadata
from sim.calibration.validation import read_measured, validate
from sim.costs.profile import load_profile
from sim.costs.profile_costs import ProfileCosts

FOLDER = Path(__file__).parents[2] / "docs" / "measurements"
RUNS = read_measured(
    [FOLDER / f"{name}.json" for name in ("h200_policies", "h200_fit", "h200_held")]
)
STREAMS = [timeline for timeline in RUNS if timeline.meta["stream"]]

RACES = {
    ("dsv3", 8, "pp-parallel"),
    ("dsv3", 2, "pp-parallel"),
    ("dsv3", 2, "pp-parallel+full"),
    ("dsv3", 4, "fast"),
    ("dsv4", 4, "none"),
    ("dsv4", 2, "full"),
}
"""Model, layers and policy of runs with a race: a rank may find a kernel on disk or compile it
(docs/predictions.md)."""

MOST_BY_CHANCE = 2


@pytest.mark.parametrize("timeline", STREAMS, ids=lambda timeline: timeline.policy)
def test_measured_stalls_are_those_predicted(timeline: Timeline) -> None:
    scenario = read_metadata(timeline).scenario
    node_of = scenario.parallel.node_of
    recorded = {(i, name, node_of(rank), key) for i, name, rank, key in timeline.meta["stalls"]}
    stalls = stalls_of(
        record(scenario).ranks, table_of(scenario), node_of, kernels_at_start(scenario)
    )
    predicted = {(stall.forward, stall.name, stall.node, stall.kernel) for stall in stalls}
    if scenario.policy in (WarmupPolicy.PLANNED, WarmupPolicy.PREBUILT):
        assert recorded == set()
    else:
        assert recorded == predicted and recorded


def test_measurements_have_a_stream_for_every_policy() -> None:
    assert {timeline.policy for timeline in STREAMS} == {policy.value for policy in WarmupPolicy}


def test_predicted_compiles_and_duplicates_are_exact_except_in_races() -> None:
    for item in validate(RUNS, load_profile("h200")):
        measured, predicted = item.measured, item.predicted.timeline
        race = (measured.meta["model"], measured.meta["layers"], measured.policy) in RACES
        off = MOST_BY_CHANCE if race else 0
        assert abs(measured.kernels_compiled - predicted.kernels_compiled) <= off, item.name
        assert abs(measured.duplicates - predicted.duplicates) <= off, item.name


def test_validation_figures_in_the_profile_match_the_runs() -> None:
    profile = load_profile("h200")
    assert profile.validation is not None
    names = profile.validation.source.removeprefix("docs/measurements: ").split(", ")
    found = validate([run for name in names for run in read_timelines(FOLDER / name)], profile)
    errors = [abs(run.error) for run in found]
    assert profile.validation.runs == len(found)
    assert profile.validation.median_error == pytest.approx(median(errors), abs=0.0005)
    assert profile.validation.worst_error == pytest.approx(max(errors), abs=0.0005)


def test_time_slice_in_the_profile_is_the_measured_median() -> None:
    """Measured seconds divided by the number of time slices that each operation waits for."""
    profile = load_profile("h200")
    data = json.loads((FOLDER / "h200x2_shared.json").read_text())
    found = []
    for kind, ranks, ranks_per_gpu, _, seconds in data["collectives"]:
        if ranks_per_gpu > 1:
            costs = ProfileCosts(profile, profile.links["nvlink"], 16, ranks_per_gpu)
            alone = ProfileCosts(profile, profile.links["nvlink"], 16)
            op = Collective(f"{kind} x", tuple(range(ranks)), 0)
            slices = (
                costs.transfer_seconds(0) - alone.transfer_seconds(0)
                if kind == "send"
                else costs.collective_seconds(op) - alone.collective_seconds(op)
            ) / profile.gpu.time_slice
            found.append(seconds / slices)
    assert len(found) == 18
    assert round(median(found), 5) == profile.gpu.time_slice


def test_communication_of_ranks_sharing_gpus_is_predicted_within_20_percent() -> None:
    """Checked for policies whose ranks find all kernels or wait for each other's compiles."""
    runs = validate(read_measured([FOLDER / "h200x2_vn.json"]), load_profile("h200"))
    assert [len({span.rank for span in one.measured.spans}) for one in runs] == [8] * 5
    for one in runs:
        if one.measured.policy in {"none", "fast", "prebuilt"}:
            measured = sum(total.comm for total in one.measured.totals())
            predicted = sum(total.comm for total in one.predicted.timeline.totals())
            assert abs(predicted / measured - 1) < 0.2
