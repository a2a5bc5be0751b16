"""Command line of the launch: starts the ranks, or runs as one rank that torchrun started."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import click

from launch.jit import cache_of_policy, check_jit, probed_seconds
from launch.options import LaunchOptions, RunOptions, check_options
from runner.config.environ import Environ
from runner.config.fields import OptionDetails, option
from runner.config.warmup import WarmupPolicy
from runner.errors import UserError, run_guarded
from runner.options import (
    PolicyOptions,
    ReportOptions,
    ScenarioOptions,
    scenario_options,
    with_options,
)
from runner.report.outputs import check_outputs, print_timelines, write_reports
from runner.target import LibraryOptions
from runner.timeline import Timeline, read_timelines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_guarded(launch, arguments, program="torchrun -m launch")


@dataclass(frozen=True, kw_only=True)
class RankFiles:
    """Where a rank puts its results if launch itself started it."""

    result: Path | None = option(None, OptionDetails("Timeline of the run.", hidden=True))
    work_dir: Path | None = option(None, OptionDetails("Temporary directory.", hidden=True))


@click.command()
@with_options(
    scenario_options("model", "deployment", "run"),
    LibraryOptions,
    PolicyOptions,
    RunOptions,
    ReportOptions,
    RankFiles,
)
def launch(
    given: ScenarioOptions,
    kernels: LibraryOptions,
    policies: PolicyOptions,
    run: RunOptions,
    files: ReportOptions,
    rank_files: RankFiles,
) -> None:
    """Run every rank of a model for real: build, warm up, serve, and compile on the way.

    Under torchrun with WORLD_SIZE = pp * tp, this process is one of the ranks. With a single
    torchrun worker, or without torchrun, it starts the pp * tp ranks itself on this machine.
    """
    if find_spec("torch") is None:
        raise UserError("launch needs torch: pip install 'deepgemm-coldstart[torch]'")
    environ = Environ.read(os.environ)
    run = replace(run, jit=run.jit and environ.enable_jit_deepgemm)
    options = LaunchOptions(
        **vars(run),
        given=given,
        kernels=kernels,
        policies=policies.policies(environ, [WarmupPolicy.PP_PARALLEL]),
        files=files,
    )
    _check(options, environ)
    world_size = environ.world_size
    single_run = len(options.policies) == 1 and not options.probe
    if world_size == options.num_ranks and (world_size > 1 or single_run):
        _be_a_rank(options, environ, rank_files)
    elif world_size == 1:
        _start_ranks(options, environ)
    else:
        pp, tp = given.given["pp"], given.given["tp"]
        raise UserError(
            f"WORLD_SIZE={world_size} but --pp {pp} --tp {tp} needs {options.num_ranks} "
            f"ranks: run torchrun --nproc-per-node {options.num_ranks} -m launch --pp {pp} "
            f"--tp {tp}, or torchrun -m launch with the same options"
        )


def _check(options: LaunchOptions, environ: Environ) -> None:
    """Check everything that can be checked before a rank starts."""
    scenarios = [options.scenario(environ, policy=policy) for policy in options.policies]
    check_options(options)
    check_outputs(**vars(options.files), others=(options.logits, options.schedule))
    starts_ranks = environ.world_size == 1
    check_jit(options, environ, scenarios if starts_ranks else ())
    if options.probe and not starts_ranks:
        raise UserError("--probe needs launch to start the ranks itself: run it without torchrun")


def _be_a_rank(options: LaunchOptions, environ: Environ, files: RankFiles) -> None:
    from launch.limits import rank_failure
    from launch.worker import run_worker

    if len(options.policies) != 1:
        raise UserError(
            f"{len(options.policies)} policies were given to ranks that torchrun started: give "
            "one, or let launch start the ranks itself (torchrun -m launch without "
            "--nproc-per-node)"
        )
    try:
        outcome = run_worker(options, environ, files.work_dir)
        if outcome is not None:
            outcome.write(options, files.result)
    except Exception as error:
        raise rank_failure(environ.rank, error) from error


def _start_ranks(options: LaunchOptions, environ: Environ) -> None:
    from launch.elastic import start_ranks
    from launch.rank import check_nccl

    if options.backend == "nccl":
        scenario = options.scenario(environ, policy=options.policies[0])
        check_nccl(options.device, scenario.parallel.ranks_per_node)
    timelines: list[Timeline] = []
    options = replace(options, probed=probed_seconds(options, environ) if options.probe else None)
    try:
        for policy in options.policies:
            with tempfile.TemporaryDirectory(prefix="deepgemm-coldstart-") as folder:
                result = Path(folder) / "timeline.json"
                cache_dir = cache_of_policy(options, environ, policy)
                one = replace(options, policies=(policy,), cache_dir=cache_dir, probe=False)
                arguments = [*one.to_argv(), "--result", str(result), "--work-dir", folder]
                start_ranks(options.num_ranks, arguments)
                timelines += read_timelines(result)
    finally:
        # If a later policy fails, the finished runs are still reported.
        if timelines:
            print_timelines(timelines)
            write_reports(timelines, **vars(options.files))
