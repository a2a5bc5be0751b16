"""``runner sim``: serial against parallel start-up, predicted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from runner.cli.common import (
    asked_policies,
    layout_options,
    model_options,
    policy_option,
    report_options,
)
from runner.cli.simulated import (
    machine_of,
    model_of,
    scenario_of,
    simulation_options,
    with_environ,
)
from runner.cli.target import take_target
from runner.config.environ import Environ
from runner.driver.warmup import WarmupPolicy
from runner.files import write_json
from runner.kernels.table import Origin
from runner.report.outputs import check_outputs, write_reports
from runner.report.predictions import print_predictions
from runner.report.progress import counting, progress
from runner.scenario import with_one_table
from sim.costs.profile import load_profile
from sim.simulate import Machine, Prediction, simulate


@click.command()
@model_options
@layout_options(pp=4, tp=2)
@click.option(
    "--nodes",
    type=int,
    help="Nodes; the ranks of one share its cores and disk cache.  [default: one a stage]",
)
@click.option("--cores", type=int, help="CPU cores of a node.  [default: the profile's]")
@policy_option
@simulation_options
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    help="Write the prediction's figures as JSON (- for stdout, and nothing else).",
)
@report_options
def sim(
    policies: Sequence[str],
    json_path: Path | None,
    timeline: Path | None,
    trace: Path | None,
    plot: Path | None,
    **values: Any,
) -> None:
    """Predict a start-up: replay the schedule that a launch would run, in virtual time."""
    check_outputs(timeline=timeline, trace=trace, plot=plot, others=(json_path,))
    machine, predictions, origin = predictions_of(policies, values, Environ.read(os.environ))
    timelines = [prediction.timeline for prediction in predictions]
    to_stdout = json_path is not None and str(json_path) == "-"
    if json_path is not None:
        _write_json(json_path, predictions)
    if not to_stdout and str(timeline) != "-":
        print_predictions(predictions, machine, origin.describe(), bars=bool(policies))
    write_reports(timelines, timeline=timeline, trace=trace, plot=plot, quiet=to_stdout)


def predictions_of(
    policies: Sequence[str], values: dict[str, Any], environ: Environ
) -> tuple[Machine, list[Prediction], Origin]:
    """The machine that the options ask for, a prediction for each policy, and whose kernels.

    Raises:
        UserError: options that contradict each other, the model or the profile.
    """
    profile = load_profile(values["hardware"])
    values = with_environ(values, environ)
    machine, model = machine_of(profile, values), model_of(values)
    with progress("ask the library") as shown:
        target = take_target(values, environ, progress=counting(shown))
        scenarios = with_one_table(
            scenario_of(policy, model, profile, values, target)
            for policy in asked_policies(policies, environ, tuple(WarmupPolicy))
        )
    predictions = [simulate(scenario, machine) for scenario in scenarios]
    return machine, predictions, scenarios[0].table.origin


def _write_json(path: Path, predictions: Sequence[Prediction]) -> None:
    data = {"version": 1, "predictions": [_figures(prediction) for prediction in predictions]}
    write_json(path, data, indent=1)


def _figures(prediction: Prediction) -> dict[str, Any]:
    timeline, timeout = prediction.timeline, prediction.timeout
    return {
        "policy": timeline.policy,
        "up_seconds": round(timeline.up, 3),
        "wall_seconds": round(timeline.wall, 3),
        "stalls": prediction.stalls,
        "stall_seconds": round(prediction.stall_seconds, 3),
        "longest_wait": round(prediction.longest_wait, 3),
        "kernels_compiled": timeline.kernels_compiled,
        "distinct_kernels": timeline.distinct_kernels,
        "duplicates": timeline.duplicates,
        "compile_seconds_summed": round(timeline.compile_seconds, 3),
        "phases": {name: round(seconds, 3) for name, seconds in timeline.phases().items()},
        "ranks": [
            {
                "rank": totals.rank,
                "compile": round(totals.compile, 3),
                "load": round(totals.load, 3),
                "compute": round(totals.compute, 3),
                "comm": round(totals.comm, 3),
                "wait": round(totals.wait, 3),
                "setup": round(totals.setup, 3),
                "total": round(totals.total, 3),
            }
            for totals in timeline.totals()
        ],
        "timeout": None if timeout is None else vars(timeout),
        "meta": timeline.meta,
    }
