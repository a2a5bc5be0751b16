"""The options that say which deployment is planned, and for which machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource

from runner.cli.common import F, IntList, layout_options, model_options
from runner.cli.overlap_options import overlap_options
from runner.cli.target import Target
from runner.config.environ import Environ
from runner.config.gemm_algo import Bf16Fp32Algo
from runner.config.hf import load_model, with_layers
from runner.config.parallel import ParallelConfig
from runner.driver.warmup import DisaggregationMode
from runner.errors import UserError
from runner.kernels.table import Demand
from runner.kernels.types import DeepGemmKernelType
from runner.model.strategy import load_strategies
from runner.planning.demands import Deployment, plan_of
from runner.planning.gemm_spec import gemm_demands
from runner.planning.plan import Plan, make_plan


def deployment_options(function: F) -> F:
    """``--model`` to ``--without``, and ``--gemm`` with ``--max-m`` instead of a model."""
    types = [kind.name.lower() for kind in DeepGemmKernelType]
    options: tuple[Callable[[F], F], ...] = (
        model_options,
        layout_options(pp=4, tp=2),
        overlap_options,
        click.option(
            "--max-tokens",
            type=int,
            default=16384,
            show_default=True,
            metavar="N",
            help="Most tokens of an EXTEND forward (chunked prefill size).",
        ),
        click.option(
            "--decode-batch-sizes",
            type=IntList(),
            help="Batch sizes of DECODE (captured graphs).  [default: 1 to max-tokens]",
        ),
        click.option(
            "--disaggregation-mode",
            default="none",
            show_default=True,
            type=click.Choice([mode.value for mode in DisaggregationMode]),
            help="A prefill node never decodes, a decode node never extends.",
        ),
        click.option(
            "--num-sms",
            type=IntList(),
            help="SMs of the GPU; after it reduced numbers that an overlap asks for.  "
            "[default: the GPU's]",
        ),
        click.option(
            "--without",
            multiple=True,
            type=click.Choice(types),
            metavar="TYPE",
            help="A kernel type that the server does not take from DeepGEMM.",
        ),
        click.option(
            "--gemm",
            "gemms",
            multiple=True,
            metavar="TYPE:N:K[:GROUPS]",
            help="Plan single GEMMs instead of a model.",
        ),
        click.option(
            "--max-m",
            type=int,
            default=16384,
            show_default=True,
            metavar="N",
            help="Largest M of --gemm.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@dataclass(frozen=True)
class Planned:
    """What the options ask for.

    Attributes:
        deployment: None where single GEMMs are planned.
        title: one line that names it.
        plan: the plan.
    """

    deployment: Deployment | None
    title: str
    plan: Plan


def planned(values: dict[str, Any], environ: Environ, target: Target) -> Planned:
    """Take the options of :func:`deployment_options` out of ``values`` and plan.

    Raises:
        UserError: options that contradict each other or the model.
    """
    gemms, max_m = values.pop("gemms"), values.pop("max_m")
    num_sms: tuple[int, ...] = values["num_sms"] or (target.gpu.num_sms,)
    if gemms:
        _refuse_with_gemm()
        wanted: dict[Demand, None] = {}
        for spec in gemms:
            for count in num_sms:
                wanted.update(dict.fromkeys(gemm_demands(spec, max_m=max_m, num_sms=count)))
        title = f"{', '.join(gemms)}: M up to {max_m}, {_sms(num_sms)}"
        table = target.source.table(lambda: wanted)
        return Planned(None, title, make_plan(wanted, table))
    deployment = _deployment(values, num_sms, environ)
    return Planned(deployment, _title(deployment), plan_of(deployment, target.source))


def _refuse_with_gemm() -> None:
    """Options that say what a model runs mean nothing for a GEMM that is named."""
    context = click.get_current_context()
    for name in (
        "model",
        "layers",
        "pp",
        "tp",
        "ep",
        "moe_a2a",
        "overlap",
        "attn_cp",
        "stage_layers",
        "max_tokens",
        "decode_batch_sizes",
        "disaggregation_mode",
        "without",
    ):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UserError(f"--{name.replace('_', '-')} does not go with --gemm")


def _deployment(values: dict[str, Any], num_sms: tuple[int, ...], environ: Environ) -> Deployment:
    model = load_model(values["model"])
    if values["layers"] is not None:
        model = with_layers(model, values["layers"])
    return Deployment(
        model=model,
        parallel=ParallelConfig(
            pp=values["pp"],
            tp=values["tp"],
            ep=values["ep"],
            moe_a2a=values["moe_a2a"],
            attn_cp=values["attn_cp"],
            stage_layers=values["stage_layers"] or environ.stage_layers,
        ),
        num_sms=num_sms[0],
        reduced_num_sms=num_sms[1:],
        max_tokens=values["max_tokens"],
        decode_batch_sizes=values["decode_batch_sizes"],
        disaggregation=DisaggregationMode(values["disaggregation_mode"]),
        overlap=load_strategies(values["overlap"]),
        bf16_fp32_algo=environ.bf16_fp32_algo,
        without=frozenset(DeepGemmKernelType[name.upper()] for name in values["without"]),
    )


def _title(deployment: Deployment) -> str:
    model, parallel = deployment.model, deployment.parallel
    ep = (", ep" if parallel.ep else "") + (", a2a" if parallel.moe_a2a else "")
    cp = f", attn_cp {parallel.attn_cp}" if parallel.attn_cp > 1 else ""
    counts = (deployment.num_sms, *deployment.reduced_num_sms)
    return (
        f"{model.name}, {model.num_hidden_layers} layers: pp {parallel.pp} x tp {parallel.tp}"
        f"{ep}{cp}, forwards of up to {deployment.max_tokens} tokens, {_sms(counts)}"
        + _narrowed(deployment)
    )


def _narrowed(deployment: Deployment) -> str:
    """What makes a plan smaller than the model's whole."""
    words = ""
    if deployment.disaggregation is not DisaggregationMode.NONE:
        words += f", {deployment.disaggregation.value} only"
    if deployment.decode_batch_sizes is not None:
        words += f", DECODE of {','.join(map(str, deployment.decode_batch_sizes))}"
    if deployment.bf16_fp32_algo is not Bf16Fp32Algo.DEEP_GEMM:
        words += f", bf16 -> fp32 GEMMs by {deployment.bf16_fp32_algo.value}"
    if deployment.without:
        words += f", without {', '.join(sorted(kind.name.lower() for kind in deployment.without))}"
    return words


def _sms(counts: tuple[int, ...]) -> str:
    return f"{' and '.join(map(str, counts))} SMs"
