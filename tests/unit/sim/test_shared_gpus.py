"""What the profile says of ranks that share GPUs, against what was measured of them."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from runner.schedule import Collective
from sim.calibration.validation import judge, read_measured
from sim.costs.profile import load_profile
from sim.costs.profile_costs import ProfileCosts

FOLDER = Path(__file__).parents[3] / "docs" / "measurements"


def test_the_profiles_time_slice_is_the_median_of_what_was_measured() -> None:
    """Seconds of a collective over the steps and other ranks that it waits for; sends have one."""
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


def test_ranks_communicate_as_long_as_foretold_where_gpus_are_shared() -> None:
    """Of runs whose ranks find all kernels, or wait for each other to compile them, in turn."""
    runs = judge(read_measured([FOLDER / "h200x2_vn.json"]), load_profile("h200"))
    assert [len({span.rank for span in one.measured.spans}) for one in runs] == [8] * 5
    for one in runs:
        if one.measured.policy in {"none", "fast", "prebuilt"}:
            measured = sum(total.comm for total in one.measured.totals())
            predicted = sum(total.comm for total in one.predicted.timeline.totals())
            assert abs(predicted / measured - 1) < 0.2
