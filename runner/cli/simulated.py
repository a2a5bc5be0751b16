"""From the options of a command that simulates to what :func:`sim.simulate.simulate` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from runner.backend.gemm_walks import GIB
from runner.cli.common import (
    FACTOR,
    SECONDS,
    F,
    batch_sizes_option,
    check_sizes,
    max_tokens_option,
    serving_options,
    warmup_options,
)
from runner.cli.overlap_options import overlap_options
from runner.cli.target import Target, kernel_options
from runner.config.environ import Environ
from runner.config.hf import load_model, with_layers
from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig
from runner.driver.warmup import DisaggregationMode, WarmupOptions, WarmupPolicy
from runner.errors import UserError
from runner.model.strategy import load_strategies
from runner.scenario import Scenario
from sim.costs.profile import Link, Profile
from sim.costs.start_up import PHASES, StartPhases, Weights
from sim.simulate import Machine

_SKIPPABLE = {name.replace(" ", "-"): name for name in PHASES}


def simulation_options(function: F) -> F:
    """Everything of a simulation but the model, the layout, the policy and the cores."""
    options: tuple[Callable[[F], F], ...] = (
        warmup_options,
        batch_sizes_option,
        max_tokens_option,
        serving_options,
        overlap_options,
        kernel_options,
        click.option(
            "--replicas",
            type=int,
            default=1,
            show_default=True,
            metavar="R",
            help="Whole copies of the pipeline that start at once, on nodes of their own.",
        ),
        click.option(
            "--hosts",
            type=int,
            metavar="N",
            help="Machines that the nodes share.  [default: one a node]",
        ),
        click.option("--hardware", default="h200", show_default=True, help="Profile name or file."),
        click.option(
            "--host-factor",
            type=FACTOR,
            default=1.0,
            show_default=True,
            metavar="X",
            help="How many times as long the host's CPUs take (runner probe tells).",
        ),
        click.option(
            "--link", default="nvlink", show_default=True, help="One of the profile's links."
        ),
        click.option(
            "--ranks-per-gpu",
            type=int,
            default=1,
            show_default=True,
            help="Ranks that share a GPU.",
        ),
        click.option(
            "--nccl-timeout",
            type=SECONDS,
            metavar="SECONDS",
            help="Longest wait in a collective before the watchdog ends the run.  "
            "[default: torch's: 600 over NCCL, 1800 over gloo]",
        ),
        click.option(
            "--run-ahead/--no-run-ahead",
            default=None,
            help="Whether hosts queue communication and go on.  [default: as the link does]",
        ),
        click.option(
            "--weights",
            type=click.Choice([item.value for item in Weights]),
            default="disk",
            show_default=True,
            help="Where weights come from; dummy ones are made up, as launch does.",
        ),
        click.option(
            "--skip-phase",
            "skipped",
            multiple=True,
            type=click.Choice([*_SKIPPABLE]),
            help="Leave a phase before the warm-up out.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def with_environ(values: dict[str, Any], environ: Environ) -> dict[str, Any]:
    """The options with what environment variables say where an option does not.

    Raises:
        UserError: a list of sizes that holds what is none.
    """
    check_sizes(stream=values["stream"], cuda_graphs=values["cuda_graphs"])
    return {
        **values,
        "stage_layers": values["stage_layers"] or environ.stage_layers,
        "bf16_fp32_algo": environ.bf16_fp32_algo,
    }


def model_of(values: dict[str, Any]) -> ModelConfig:
    """The model of ``--model`` and ``--layers``.

    Raises:
        UserError: no such model, or not so many layers.
    """
    model = load_model(values["model"])
    return model if values["layers"] is None else with_layers(model, values["layers"])


def machine_of(profile: Profile, values: dict[str, Any]) -> Machine:
    """The machine; ``cores`` None takes the profile's.

    Raises:
        UserError: a link that the profile lacks, or a number below 1.
    """
    link_of(profile, values["link"])
    for name in ("cores", "ranks_per_gpu"):
        if values[name] is not None and values[name] <= 0:
            raise UserError(f"--{name.replace('_', '-')} {values[name]} must be above 0")
    return Machine(
        profile=profile,
        host_factor=values["host_factor"],
        cores_per_node=values["cores"],
        link=values["link"],
        ranks_per_gpu=values["ranks_per_gpu"],
        nccl_timeout=values["nccl_timeout"],
        hosts=values["hosts"],
        run_ahead=values["run_ahead"],
        start=_start(values),
    )


def link_of(profile: Profile, name: str) -> Link:
    """A link of the profile.

    Raises:
        UserError: it has no such link.
    """
    if name not in profile.links:
        known = ", ".join(profile.links)
        raise UserError(f"--link {name!r} is not in profile {profile.name}: use one of {known}")
    return profile.links[name]


def _start(values: dict[str, Any]) -> StartPhases:
    skipped = {_SKIPPABLE[name] for name in values["skipped"]}
    included = tuple(name for name in PHASES if name not in skipped)
    return StartPhases(included, Weights(values["weights"]))


def scenario_of(
    policy: WarmupPolicy,
    model: ModelConfig,
    profile: Profile,
    values: dict[str, Any],
    target: Target,
) -> Scenario:
    """What is simulated; ``values`` are of :func:`with_environ`, ``nodes`` None is one a stage.

    Raises:
        UserError: the model does not fit the layout, or the policy not the sizes.
    """
    nodes = values["nodes"]
    parallel = ParallelConfig(
        pp=values["pp"],
        tp=values["tp"],
        ep=values["ep"],
        moe_a2a=values["moe_a2a"],
        attn_cp=values["attn_cp"],
        replicas=values["replicas"],
        nodes=values["replicas"] * values["pp"] if nodes is None else nodes,
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
        num_sms=target.gpu.sms,
        prompt_len=values["prompt_len"],
        bf16_fp32_algo=values["bf16_fp32_algo"],
        max_tokens=values["max_tokens"],
        stream=values["stream"],
        overlap=load_strategies(values["overlap"]),
        walk_memory=walk_memory_of(profile, values["walk_memory"]),
        source=target.source,
    )


def walk_memory_of(profile: Profile, given: float | None) -> float:
    """Bytes that a walk may take: as asked in GiB, else what a server's cache leaves free."""
    if given is not None:
        return given * GIB
    return profile.gpu.memory * profile.start_up.graph_free
