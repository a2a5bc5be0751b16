"""``runner sim``: predict serial and parallel start-ups."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from runner.config.environ import Environ
from runner.config.fields import OptionDetails, option
from runner.config.warmup import WarmupPolicy
from runner.files import write_json
from runner.options import (
    PolicyOptions,
    ReportOptions,
    ScenarioOptions,
    scenario_options,
    with_options,
)
from runner.planning.plan import with_one_table
from runner.report.outputs import check_outputs, write_reports
from runner.report.predictions import print_predictions
from runner.report.progress import counting, progress
from runner.standin.gpus import gpu_named
from runner.target import LibraryOptions, target_of
from sim.costs.profile import load_profile
from sim.machine import MachineOptions, gpu_of, with_walk_memory
from sim.simulate import Prediction, simulate


@dataclass(frozen=True, kw_only=True)
class SimOptions:
    """Where to write the figures."""

    json: Path | None = option(
        None,
        OptionDetails("Write the prediction's figures as JSON (- for stdout, and nothing else)."),
    )


@click.command()
@with_options(
    scenario_options("model", "deployment", "run", "placement", pp=4, tp=2),
    LibraryOptions,
    PolicyOptions,
    MachineOptions,
    SimOptions,
    ReportOptions,
)
def sim(
    given: ScenarioOptions,
    library: LibraryOptions,
    policies: PolicyOptions,
    machine: MachineOptions,
    options: SimOptions,
    files: ReportOptions,
) -> None:
    """Predict a start-up by replaying in virtual time the schedule that launch would run."""
    check_outputs(**vars(files), others=(options.json,))
    environ, profile = Environ.read(os.environ), load_profile(machine.hardware)
    simulated = machine.machine(profile)
    with progress("ask the library") as shown:
        gpu = gpu_named(library.gpu or gpu_of(profile))
        target = target_of(library, gpu, environ, progress=counting(shown))
        scenarios = with_one_table(
            with_walk_memory(
                given.scenario(
                    environ, policy=policy, num_sms=target.gpu.num_sms, source=target.source
                ),
                profile,
            )
            for policy in policies.policies(environ, tuple(WarmupPolicy))
        )
    predictions = [simulate(scenario, simulated) for scenario in scenarios]
    to_stdout = str(options.json) == "-"
    if options.json is not None:
        _write_json(options.json, predictions)
    if not to_stdout and str(files.timeline) != "-":
        origin = scenarios[0].source.origin.describe()
        print_predictions(predictions, simulated, origin, bars=bool(policies.warmup))
    write_reports([item.timeline for item in predictions], **vars(files), quiet=to_stdout)


def _write_json(path: Path, predictions: Sequence[Prediction]) -> None:
    data = {"version": 1, "predictions": [_figures(prediction) for prediction in predictions]}
    write_json(path, data, indent=1)


def _figures(prediction: Prediction) -> dict[str, object]:
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
