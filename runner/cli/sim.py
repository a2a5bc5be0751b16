"""``runner sim``: serial against parallel start-up, predicted."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from runner.cli.common import (
    SECONDS,
    batch_sizes_option,
    layout_options,
    max_tokens_option,
    model_options,
    report_options,
    serving_options,
)
from runner.config.hf import load_model, with_layers
from runner.config.parallel import ParallelConfig
from runner.environ import Environ
from runner.errors import UserError
from runner.files import write_text
from runner.report.outputs import check_outputs, print_timelines, write_reports
from runner.report.table import phase_summary
from runner.scenario import Scenario
from runner.timeline import Timeline
from runner.warmup import (
    RUNNABLE_POLICIES,
    DisaggregationMode,
    WarmupOptions,
    WarmupPolicy,
)
from sim.profile import Profile, load_profile
from sim.simulate import Machine, Prediction, simulate


@click.command()
@model_options
@layout_options(pp=4, tp=2)
@click.option(
    "--nodes",
    type=int,
    help="Nodes; the ranks of one share its cores and disk cache.  [default: one a stage]",
)
@click.option(
    "--warmup",
    "policies",
    multiple=True,
    default=["none", "pp-parallel", "planned"],
    show_default=True,
    type=click.Choice([policy.value for policy in RUNNABLE_POLICIES]),
    help="Policies to predict, the first is the reference.",
)
@batch_sizes_option
@max_tokens_option
@serving_options
@click.option("--hardware", default="h200", show_default=True, help="Profile name or file.")
@click.option("--cores", type=int, help="CPU cores of a node.  [default: the profile's]")
@click.option("--link", default="nvlink", show_default=True, help="One of the profile's links.")
@click.option(
    "--ranks-per-gpu", type=int, default=1, show_default=True, help="Ranks that share a GPU."
)
@click.option(
    "--nccl-timeout",
    type=SECONDS,
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Longest wait in a collective before the watchdog ends the run.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    help="Write the prediction's figures as JSON (- for stdout, and nothing else).",
)
@report_options
def sim(policies: Sequence[str], json_path: Path | None, timeline: Path | None,
        trace: Path | None, plot: Path | None, **values: Any) -> None:  # fmt: skip
    """Predict a start-up: replay the schedule that a launch would run, in virtual time."""
    check_outputs(timeline=timeline, trace=trace, plot=plot, others=(json_path,))
    profile = load_profile(values.pop("hardware"))
    environ = Environ.read(os.environ)
    values["stage_layers"] = values["stage_layers"] or environ.stage_layers
    values["bf16_fp32_algo"] = environ.bf16_fp32_algo
    machine = _machine(profile, values)
    predictions = [
        simulate(_scenario(WarmupPolicy(name), profile, values), machine)
        for name in dict.fromkeys(policies)
    ]
    timelines = [prediction.timeline for prediction in predictions]
    to_stdout = json_path is not None and str(json_path) == "-"
    if json_path is not None:
        _write_json(json_path, predictions)
    if not to_stdout and str(timeline) != "-":
        _print(predictions, machine)
    write_reports(timelines, timeline=timeline, trace=trace, plot=plot)


def _machine(profile: Profile, values: dict[str, Any]) -> Machine:
    link, cores = values["link"], values["cores"]
    if link not in profile.links:
        known = ", ".join(profile.links)
        raise UserError(f"--link {link!r} is not in profile {profile.name}: use one of {known}")
    for name in ("cores", "ranks_per_gpu"):
        if values[name] is not None and values[name] <= 0:
            raise UserError(f"--{name.replace('_', '-')} {values[name]} must be above 0")
    return Machine(
        profile=profile,
        cores_per_node=cores,
        link=link,
        ranks_per_gpu=values["ranks_per_gpu"],
        nccl_timeout=values["nccl_timeout"],
    )


def _scenario(policy: WarmupPolicy, profile: Profile, values: dict[str, Any]) -> Scenario:
    model = load_model(values["model"])
    if values["layers"] is not None:
        model = with_layers(model, values["layers"])
    parallel = ParallelConfig(
        pp=values["pp"],
        tp=values["tp"],
        ep=values["ep"],
        attn_cp=values["attn_cp"],
        nodes=values["pp"] if values["nodes"] is None else values["nodes"],
        stage_layers=values["stage_layers"],
    )
    return Scenario(
        model=model,
        parallel=parallel,
        warmup=WarmupOptions(
            policy=policy,
            batch_sizes=values["batch_sizes"],
            disaggregation=DisaggregationMode(values["disaggregation_mode"]),
            speculative=values["speculative"],
        ),
        num_sms=profile.num_sms,
        prompt_len=values["prompt_len"],
        bf16_fp32_algo=values["bf16_fp32_algo"],
        max_tokens=values["max_tokens"],
    )


def _print(predictions: Sequence[Prediction], machine: Machine) -> None:
    meta = predictions[0].timeline.meta
    sizes = ",".join(map(str, meta["batch_sizes"]))
    print(
        f"{meta['model']}, {meta['layers']} layers: pp {meta['pp']} x tp {meta['tp']} on "
        f"{meta['nodes']} node(s), {machine.profile.name}, {meta['cores_per_node']} cores a node\n"
        f"cold caches; warm-up and requests of batch sizes {sizes}\n"
    )
    timelines = [prediction.timeline for prediction in predictions]
    print_timelines(timelines, tables=False)
    for timeline in timelines:
        Console(width=100).print(phase_summary(timeline))
    _print_verdict(timelines)
    for prediction in predictions:
        if prediction.timeout is not None:
            lost = prediction.timeout
            print(
                f"{prediction.timeline.policy}: the watchdog ends this run at {lost.time:.0f} s: "
                f"rank {lost.rank} waits for rank {lost.waiting_for} in {lost.operation} while "
                f"that does {lost.busy_with}; --nccl-timeout {ceil(lost.needed)} would survive"
            )


def _print_verdict(timelines: Sequence[Timeline]) -> None:
    if len(timelines) < 2:
        return
    first, best = timelines[0], min(timelines, key=lambda timeline: timeline.wall)
    if best is first:
        print(f"{first.policy} is the fastest: {first.wall:.1f} s")
        return
    saving = 1 - best.wall / first.wall
    print(
        f"{first.policy} {first.wall:.1f} s, {best.policy} {best.wall:.1f} s: "
        f"{saving:.0%} less, {first.wall / best.wall:.1f} times as fast"
    )


def _write_json(path: Path, predictions: Sequence[Prediction]) -> None:
    data = {"version": 1, "predictions": [_figures(prediction) for prediction in predictions]}
    write_text(path, json.dumps(data, indent=1))


def _figures(prediction: Prediction) -> dict[str, Any]:
    timeline, timeout = prediction.timeline, prediction.timeout
    return {
        "policy": timeline.policy,
        "wall_seconds": round(timeline.wall, 3),
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
                "total": round(totals.total, 3),
            }
            for totals in timeline.totals()
        ],
        "timeout": None if timeout is None else vars(timeout),
        "meta": timeline.meta,
    }
