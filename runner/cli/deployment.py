"""The options that say which deployment is planned, and for which machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from runner.bf16_fp32 import Bf16Fp32Algo
from runner.cli.common import F, IntList, layout_options, model_options
from runner.cli.overlap_options import overlap_options
from runner.config.hf import load_model, with_layers
from runner.config.parallel import ParallelConfig
from runner.deployment import Deployment, plan_of
from runner.environ import Environ
from runner.errors import UserError
from runner.gemm_spec import gemm_demands
from runner.jit.compiler import OLDEST_RELEASE, NvccCompiler, find_nvcc
from runner.jit.kernel_type import DeepGemmKernelType
from runner.jit.keys import CacheKeys
from runner.jit.library import Library, find_library
from runner.jit.plan import Demand, Plan, make_plan
from runner.model.strategy import load_strategies
from runner.warmup import DisaggregationMode


def deployment_options(function: F) -> F:
    """``--model`` to ``--without``, and ``--gemm`` with ``--max-m`` instead of a model."""
    types = [kind.name.lower() for kind in DeepGemmKernelType]
    options: tuple[Callable[[F], F], ...] = (
        model_options,
        layout_options(pp=4, tp=2),
        overlap_options,
        click.option("--max-tokens", type=int, default=16384, show_default=True, metavar="N",
                     help="Most tokens of an EXTEND forward (chunked prefill size)."),
        click.option("--decode-batch-sizes", type=IntList(),
                     help="Batch sizes of DECODE (captured graphs).  [default: 1 to max-tokens]"),
        click.option("--disaggregation-mode", default="none", show_default=True,
                     type=click.Choice([mode.value for mode in DisaggregationMode]),
                     help="A prefill node never decodes, a decode node never extends."),
        click.option("--num-sms", type=IntList(), default="132", show_default=True,
                     help="SMs of the GPU; after it reduced numbers that an overlap asks for."),
        click.option("--without", multiple=True, type=click.Choice(types), metavar="TYPE",
                     help="A kernel type that the server does not take from DeepGEMM."),
        click.option("--gemm", "gemms", multiple=True, metavar="TYPE:N:K[:GROUPS]",
                     help="Plan single GEMMs instead of a model."),
        click.option("--max-m", type=int, default=16384, show_default=True, metavar="N",
                     help="Largest M of --gemm."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def target_options(function: F) -> F:
    """``--target-root`` and ``--cuda-version``: the machine that will run."""
    for option in (
        click.option("--cuda-version", metavar="X.Y",
                     help="CUDA release of that machine's nvcc.  "
                          "[default: the cache's or plan's, else this nvcc's]"),
        click.option("--target-root", type=click.Path(path_type=Path), metavar="PATH",
                     help="The deep_gemm folder of the machine that will run.  "
                          "[default: the cache's or plan's, else ours]"),
    ):  # fmt: skip
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


def planned(values: dict[str, Any], environ: Environ) -> Planned:
    """Take the options of :func:`deployment_options` out of ``values`` and plan.

    Raises:
        UserError: options that contradict each other or the model.
    """
    gemms, max_m = values.pop("gemms"), values.pop("max_m")
    num_sms: tuple[int, ...] = values["num_sms"]
    if gemms:
        _refuse_with_gemm()
        wanted: dict[Demand, None] = {}
        for spec in gemms:
            for count in num_sms:
                wanted.update(dict.fromkeys(gemm_demands(spec, max_m=max_m, num_sms=count)))
        title = f"{', '.join(gemms)}: M up to {max_m}, {_sms(num_sms)}"
        return Planned(None, title, make_plan(wanted))
    deployment = _deployment(values, environ)
    return Planned(deployment, _title(deployment), plan_of(deployment))


def _refuse_with_gemm() -> None:
    """Options that say what a model runs mean nothing for a GEMM that is named."""
    context = click.get_current_context()
    for name in ("model", "layers", "pp", "tp", "ep", "moe_a2a", "overlap", "attn_cp",
                 "stage_layers", "max_tokens", "decode_batch_sizes",
                 "disaggregation_mode", "without"):  # fmt: skip
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UserError(f"--{name.replace('_', '-')} does not go with --gemm")


def _deployment(values: dict[str, Any], environ: Environ) -> Deployment:
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
        num_sms=values["num_sms"][0],
        reduced_num_sms=values["num_sms"][1:],
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


@dataclass(frozen=True)
class Target:
    """Keys for the machine that will run, or why there are none."""

    keys: CacheKeys | None
    lacking: str


def find_target(target_root: Path | None, cuda_version: str | None) -> Target:
    """Keys as ``--target-root`` and ``--cuda-version`` ask for.

    Raises:
        UserError: a library that is not known, or a version that is none.
    """
    environ = Environ.read(os.environ)
    if target_root is not None and not target_root.is_absolute():
        raise UserError(f"--target-root {target_root} must be an absolute path: the key holds it")
    if cuda_version is not None:
        _check_release(cuda_version)
    library = find_library()
    if library is None:
        return Target(
            None,
            "deep_gemm's headers are missing: pip install --no-deps sgl-deep-gemm==0.1.4.post1",
        )
    signature = _signature(cuda_version, library, environ)
    if signature is None:
        return Target(None, "there is no nvcc here: name the runner's with --cuda-version X.Y")
    root = library.root if target_root is None else target_root
    return Target(CacheKeys(library, root / "include", signature, environ), "")


def _signature(cuda_version: str | None, library: Library, environ: Environ) -> str | None:
    if cuda_version is not None:
        return "NVCC{}.{}".format(*_check_release(cuda_version))
    nvcc = find_nvcc(environ)
    return None if nvcc is None else NvccCompiler(nvcc, library, environ).signature


def _check_release(text: str) -> tuple[int, int]:
    """The numbers of ``X.Y``, which must be a release that the library's flags are made for."""
    major, dot, minor = text.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        raise UserError(f"--cuda-version {text!r} must be X.Y, such as 13.0")
    release = int(major), int(minor)
    if release < OLDEST_RELEASE:
        oldest = "{}.{}".format(*OLDEST_RELEASE)
        raise UserError(f"--cuda-version {text} is too old: {oldest} or newer is needed")
    return release
