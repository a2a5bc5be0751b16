"""``runner sim``: serial against parallel start-up, predicted."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from runner.cli.common import (
    SECONDS,
    asked_policies,
    batch_sizes_option,
    check_sizes,
    layout_options,
    max_tokens_option,
    model_options,
    report_options,
    serving_options,
    warmup_options,
)
from runner.config.hf import load_model, with_layers
from runner.config.parallel import ParallelConfig
from runner.environ import Environ
from runner.errors import UserError
from runner.files import write_text
from runner.report.outputs import check_outputs, write_reports
from runner.scenario import Scenario
from runner.walk_memory import GIB
from runner.warmup import DisaggregationMode, WarmupOptions, WarmupPolicy
from sim.advice import print_predictions
from sim.profile import Profile, load_profile
from sim.simulate import Machine, Prediction, simulate
from sim.start_up import PHASES, StartPhases, Weights


@click.command()
@model_options
@layout_options(pp=4, tp=2)
@click.option(
    "--nodes",
    type=int,
    help="Nodes; the ranks of one share its cores and disk cache.  [default: one a stage]",
)
@click.option(
    "--replicas",
    type=int,
    default=1,
    show_default=True,
    metavar="R",
    help="Whole copies of the pipeline that start at once, on nodes of their own.",
)
@click.option(
    "--hosts", type=int, metavar="N", help="Machines that the nodes share.  [default: one a node]"
)
@warmup_options
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
    "--run-ahead/--no-run-ahead",
    default=None,
    help="Whether hosts queue communication and go on.  [default: as the link does]",
)
@click.option(
    "--weights",
    type=click.Choice([*(item.value for item in Weights), "skip"]),
    default="disk",
    show_default=True,
    help="Where weights come from; dummy ones are made up, as launch does.",
)
@click.option(
    "--skip-phase",
    "skipped",
    multiple=True,
    type=click.Choice(PHASES),
    help="Leave a phase before the warm-up out.",
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
    check_sizes(stream=values["stream"], cuda_graphs=values["cuda_graphs"])
    values["stage_layers"] = values["stage_layers"] or environ.stage_layers
    values["bf16_fp32_algo"] = environ.bf16_fp32_algo
    machine = _machine(profile, values)
    wanted = asked_policies(policies, environ, tuple(WarmupPolicy))
    predictions = [simulate(_scenario(policy, profile, values), machine) for policy in wanted]
    timelines = [prediction.timeline for prediction in predictions]
    to_stdout = json_path is not None and str(json_path) == "-"
    if json_path is not None:
        _write_json(json_path, predictions)
    if not to_stdout and str(timeline) != "-":
        print_predictions(predictions, machine, bars=bool(policies))
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
        hosts=values["hosts"],
        run_ahead=values["run_ahead"],
        start=_start(values),
    )


def _start(values: dict[str, Any]) -> StartPhases:
    skipped = set(values["skipped"]) | ({"weights"} if values["weights"] == "skip" else set())
    weights = Weights.DISK if values["weights"] == "skip" else Weights(values["weights"])
    return StartPhases(tuple(name for name in PHASES if name not in skipped), weights)


def _scenario(policy: WarmupPolicy, profile: Profile, values: dict[str, Any]) -> Scenario:
    model = load_model(values["model"])
    if values["layers"] is not None:
        model = with_layers(model, values["layers"])
    parallel = ParallelConfig(
        pp=values["pp"],
        tp=values["tp"],
        ep=values["ep"],
        attn_cp=values["attn_cp"],
        replicas=values["replicas"],
        nodes=values["nodes"] or values["replicas"] * values["pp"],
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
            graph_batch_sizes=values["cuda_graphs"] or (),
            walk_max_m=values["walk_max_m"],
            compile_lock=values["compile_lock"],
        ),
        num_sms=profile.num_sms,
        prompt_len=values["prompt_len"],
        bf16_fp32_algo=values["bf16_fp32_algo"],
        max_tokens=values["max_tokens"],
        stream=values["stream"],
        walk_memory=_walk_memory(profile, values["walk_memory"]),
    )


def _walk_memory(profile: Profile, given: float | None) -> float:
    """Bytes that a walk may take: as asked, else what a server's cache leaves free."""
    if given is not None:
        return given * GIB
    return profile.gpu.memory * profile.start_up.graph_free


def _write_json(path: Path, predictions: Sequence[Prediction]) -> None:
    data = {"version": 1, "predictions": [_figures(prediction) for prediction in predictions]}
    write_text(path, json.dumps(data, indent=1))


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
                "total": round(totals.total, 3),
            }
            for totals in timeline.totals()
        ],
        "timeout": None if timeout is None else vars(timeout),
        "meta": timeline.meta,
    }
