"""From the options of a command that simulates to what :func:`sim.simulate.simulate` takes."""

from __future__ import annotations

from typing import Any

import click

from runner.cli.common import SECONDS, F
from runner.config.hf import load_model, with_layers
from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig
from runner.environ import Environ
from runner.errors import UserError
from runner.scenario import Scenario
from runner.warmup import DisaggregationMode, WarmupOptions, WarmupPolicy
from sim.profile import Profile
from sim.simulate import Machine


def machine_options(function: F) -> F:
    """``--hardware``, ``--link``, ``--ranks-per-gpu``, ``--nccl-timeout``."""
    options = (
        click.option("--nccl-timeout", type=SECONDS, default=600.0, show_default=True,
                     metavar="SECONDS",
                     help="Longest wait in a collective before the watchdog ends the run."),
        click.option("--ranks-per-gpu", type=int, default=1, show_default=True,
                     help="Ranks that share a GPU."),
        click.option("--link", default="nvlink", show_default=True,
                     help="One of the profile's links."),
        click.option("--hardware", default="h200", show_default=True,
                     help="Profile name or file."),
    )  # fmt: skip
    for option in options:
        function = option(function)
    return function


def with_environ(values: dict[str, Any], environ: Environ) -> dict[str, Any]:
    """The options with what environment variables say where an option does not."""
    return {
        **values,
        "stage_layers": values["stage_layers"] or environ.stage_layers,
        "deep_gemm_bf16_fp32": environ.deep_gemm_bf16_fp32,
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
    link = values["link"]
    if link not in profile.links:
        known = ", ".join(profile.links)
        raise UserError(f"--link {link!r} is not in profile {profile.name}: use one of {known}")
    for name in ("cores", "ranks_per_gpu"):
        if values[name] is not None and values[name] <= 0:
            raise UserError(f"--{name.replace('_', '-')} {values[name]} must be above 0")
    return Machine(
        profile=profile,
        cores_per_node=values["cores"],
        link=link,
        ranks_per_gpu=values["ranks_per_gpu"],
        nccl_timeout=values["nccl_timeout"],
    )


def scenario_of(
    policy: WarmupPolicy, model: ModelConfig, profile: Profile, values: dict[str, Any]
) -> Scenario:
    """What is simulated; ``values`` are of :func:`with_environ`, ``nodes`` None is one a stage.

    Raises:
        UserError: the model does not fit the layout, or the policy not the sizes.
    """
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
        deep_gemm_bf16_fp32=values["deep_gemm_bf16_fp32"],
        max_tokens=values["max_tokens"],
    )
