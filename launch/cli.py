"""Command line of the launch: starts its own ranks, or is one of those torchrun started."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from launch.jit_setup import cache_of_policy, check_jit, check_prebuilt, probed_seconds
from launch.options import LaunchOptions
from runner.cli.common import (
    SECONDS,
    asked_policies,
    batch_sizes_option,
    check_sizes,
    layout_options,
    max_tokens_option,
    model_options,
    policy_option,
    report_options,
    serving_options,
    warmup_options,
)
from runner.cli.guard import run_guarded
from runner.cli.overlap_options import overlap_options
from runner.config.environ import Environ
from runner.config.timeouts import TORCH_TIMEOUTS_HELP
from runner.driver.warmup import DisaggregationMode, WarmupPolicy
from runner.errors import UserError
from runner.kernels.installed import LIBRARIES
from runner.report.outputs import check_outputs, print_timelines, write_reports
from runner.standin.gpus import DEFAULT_GPU
from runner.timeline import Timeline, read_timelines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_guarded(launch, arguments, program="torchrun -m launch")


@click.command()
@model_options
@layout_options(pp=1, tp=1)
@click.option(
    "--virtual-nodes",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Give each of N groups of ranks a cache directory of its own.",
)
@policy_option
@warmup_options
@batch_sizes_option
@max_tokens_option
@overlap_options
@serving_options
@click.option(
    "--compute",
    type=click.Choice(["real", "skip"]),
    help="Do the math, or only shapes, communication and JIT.  [default: by size]",
)
@click.option("--jit/--no-jit", default=True, show_default=True, help="Compile kernels.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "nccl", "gloo"]),
    default="auto",
    show_default=True,
    help="What ranks on GPUs meet over; auto is NCCL where each has its own. With "
    "--virtual-nodes, nccl lets nodes share GPUs.",
)
@click.option(
    "--gpu",
    metavar="NAME",
    default=DEFAULT_GPU,
    show_default=True,
    help="Without a GPU: the one that kernels are compiled for, named as runner plan names it.",
)
@click.option(
    "--num-sms",
    type=int,
    help="Without a GPU: SMs of the GPU that kernels are compiled for.  [default: --gpu's]",
)
@click.option(
    "--library",
    metavar="NAME|PATH",
    help=f"Whose kernels: {', '.join(LIBRARIES)}, or a deep_gemm folder.  [default: the installed "
    "one]",
)
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    help="Kernel cache.  [default: DG_JIT_CACHE_DIR, else cold and temporary]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the weights.")
@click.option(
    "--timeout",
    type=SECONDS,
    default=1800.0,
    show_default=True,
    metavar="SECONDS",
    help="Longest run.",
)
@click.option(
    "--nccl-timeout",
    type=SECONDS,
    metavar="SECONDS",
    help=f"Longest wait of a communication.  [default: {TORCH_TIMEOUTS_HELP}]",
)
@click.option(
    "--probe",
    is_flag=True,
    help="First time a reference compile here, so that runs at other times can be compared.",
)
@click.option("--probed", type=SECONDS, hidden=True)
@click.option(
    "--logits",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the requests' logits (torch.save, from the last stage).",
)
@click.option(
    "--schedule",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the operations that really ran, as JSON.",
)
@report_options
@click.option("--result", type=click.Path(path_type=Path), hidden=True)
@click.option("--work-dir", type=click.Path(path_type=Path), hidden=True)
def launch(
    result: Path | None,
    work_dir: Path | None,
    policies: Sequence[str],
    disaggregation_mode: str,
    **values: Any,
) -> None:
    """Run every rank of a model for real: build, warm up, serve, compile on the way.

    Under torchrun with WORLD_SIZE = pp * tp this process is one of the ranks. Under a single
    worker, or without torchrun, it starts pp * tp ranks on this machine itself.
    """
    if find_spec("torch") is None:
        raise UserError("launch needs torch: pip install 'deepgemm-coldstart[torch]'")
    environ = Environ.read(os.environ)
    check_sizes(stream=values["stream"], cuda_graphs=values["cuda_graphs"])
    values["jit"] = values["jit"] and environ.enable_jit_deepgemm
    options = LaunchOptions(
        policies=asked_policies(policies, environ, [WarmupPolicy.PP_PARALLEL]),
        disaggregation=DisaggregationMode(disaggregation_mode),
        **{**values, "stage_layers": values["stage_layers"] or environ.stage_layers},
    )
    _check(options, environ)
    num_ranks = options.pp * options.tp
    world_size = environ.world_size or 1
    alone = len(options.policies) == 1 and not options.probe
    if world_size == num_ranks and (num_ranks > 1 or alone):
        _be_a_rank(options, environ, result, work_dir)
    elif world_size == 1:
        _start_ranks(options, environ, num_ranks)
    else:
        raise UserError(_wrong_world_size(options, world_size))


def _check(options: LaunchOptions, environ: Environ) -> None:
    """Everything that can be wrong before a rank starts."""
    for policy in options.policies:
        scenario = options.scenario(environ, policy=policy)
        assert scenario.requests, "a scenario without requests measures nothing"
    if options.num_sms is not None and (options.num_sms < 2 or options.num_sms % 2):
        raise UserError(f"--num-sms {options.num_sms} must be a positive even number")
    if options.nccl_timeout is not None and options.nccl_timeout < 1:
        raise UserError(
            f"--nccl-timeout {options.nccl_timeout:g} must be at least 1: ranks need some time to "
            "connect"
        )
    if options.backend == "nccl" and options.compute == "skip":
        raise UserError("--backend nccl with --compute skip: without math nothing is on a GPU")
    if str(options.timeline) == "-":
        raise UserError("--timeline needs a file: a launch prints its progress")
    single = {"--logits": options.logits, "--schedule": options.schedule}
    for flag, path in single.items():
        if path is not None and len(options.policies) > 1:
            raise UserError(f"{flag} {path} holds one run: give one --warmup with it")
    check_outputs(
        timeline=options.timeline,
        trace=options.trace,
        plot=options.plot,
        others=tuple(single.values()),
    )
    check_jit(options, environ)
    if options.probe and (environ.world_size or 1) > 1:
        raise UserError("--probe needs launch to start the ranks itself: run it without torchrun")
    if (environ.world_size or 1) == 1:
        for policy in options.policies:
            check_prebuilt(options, environ, options.scenario(environ, policy=policy))


def _wrong_world_size(options: LaunchOptions, world_size: int) -> str:
    num_ranks = options.pp * options.tp
    return (
        f"WORLD_SIZE={world_size} but --pp {options.pp} --tp {options.tp} needs {num_ranks} "
        f"ranks: run torchrun --nproc-per-node {num_ranks} -m launch --pp {options.pp} "
        f"--tp {options.tp}, or torchrun -m launch with the same options"
    )


def _be_a_rank(
    options: LaunchOptions, environ: Environ, result: Path | None, work_dir: Path | None
) -> None:
    from launch.failure import rank_failure
    from launch.report import finish
    from launch.worker import run_worker

    if len(options.policies) != 1:
        raise UserError(
            f"{len(options.policies)} policies were given to ranks that torchrun started: give "
            "one, or let launch start the ranks itself (torchrun -m launch without "
            "--nproc-per-node)"
        )
    rank = environ.rank or 0
    say = _say if rank == 0 else lambda line: None
    try:
        outcome = run_worker(options, environ, options.policies[0], say=say, work_dir=work_dir)
        if outcome is not None:
            finish(options, outcome, result)
    except Exception as error:
        raise rank_failure(rank, error) from error


def _say(line: str) -> None:
    print(line, flush=True)


def _start_ranks(options: LaunchOptions, environ: Environ, num_ranks: int) -> None:
    from launch.elastic import start_ranks
    from launch.place import check_nccl

    if options.backend == "nccl":
        check_nccl(options.device, options.parallel(environ).ranks_per_node)
    timelines: list[Timeline] = []
    options = replace(options, probed=probed_seconds(options, environ) if options.probe else None)
    try:
        for policy in options.policies:
            with tempfile.TemporaryDirectory(prefix="deepgemm-coldstart-") as folder:
                result = Path(folder) / "timeline.json"
                one = replace(
                    options,
                    policies=(policy,),
                    timeline=None,
                    trace=None,
                    plot=None,
                    cache_dir=cache_of_policy(options, environ, policy),
                )
                arguments = [*_arguments(one), "--result", str(result), "--work-dir", folder]
                start_ranks(num_ranks, arguments)
                timelines += read_timelines(result)
    finally:
        # Where a later policy fails, the runs before it are not lost.
        if timelines:
            print_timelines(timelines)
            write_reports(
                timelines, timeline=options.timeline, trace=options.trace, plot=options.plot
            )


def _arguments(options: LaunchOptions) -> list[str]:
    """The command line that gives these options."""
    flags = {
        "--model": options.model,
        "--layers": options.layers,
        "--pp": options.pp,
        "--tp": options.tp,
        "--attn-cp": options.attn_cp,
        "--stage-layers": options.stage_layers,
        "--virtual-nodes": options.virtual_nodes,
        "--warmup": options.policies[0].value,
        "--batch-sizes": options.batch_sizes,
        "--prompt-len": options.prompt_len,
        "--max-tokens": options.max_tokens,
        "--disaggregation-mode": options.disaggregation.value,
        "--compute": options.compute,
        "--device": options.device,
        "--backend": options.backend,
        "--gpu": options.gpu,
        "--num-sms": options.num_sms,
        "--library": options.library,
        "--cache-dir": options.cache_dir,
        "--seed": options.seed,
        "--timeout": options.timeout,
        "--nccl-timeout": options.nccl_timeout,
        "--probed": options.probed,
        "--stream": options.stream,
        "--cuda-graphs": options.cuda_graphs,
        "--walk-max-m": options.walk_max_m,
        "--walk-memory": options.walk_memory,
        "--logits": options.logits,
        "--schedule": options.schedule,
    }
    words = []
    for flag, value in flags.items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [flag, text]
    for name in options.overlap:
        words += ["--overlap", name]
    words += ["--moe-a2a"] * options.moe_a2a
    words += ["--ep"] * options.ep + ["--speculative"] * options.speculative
    words += ["--compile-lock"] * options.compile_lock
    return [*words, "--jit" if options.jit else "--no-jit"]
