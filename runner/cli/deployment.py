"""Plan what the options name: a model's deployment, or single GEMMs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
from click.core import ParameterSource

from runner.cli.calls import Planned, plan_calls
from runner.config.environ import Bf16Fp32Algo, Environ
from runner.config.fields import OptionDetails, option
from runner.config.warmup import DisaggregationMode
from runner.errors import UserError
from runner.kernels.table import Demand
from runner.options import ScenarioOptions
from runner.planning.gemm_spec import gemm_demands
from runner.planning.plan import make_plan, plan_of
from runner.recording.recording import read_recording
from runner.report.console import counted
from runner.scenario import MAX_TOKENS, Scenario
from runner.target import Target

_MAX_M = 16384


@dataclass(frozen=True, kw_only=True)
class PlannedOptions:
    """SM counts to plan for, and single GEMMs instead of a model."""

    num_sms: tuple[int, ...] | None = option(
        None,
        OptionDetails(
            "SMs of the GPU, then any reduced counts that an overlap uses.  [default: the GPU's]"
        ),
    )
    gemm: tuple[str, ...] = option(
        (), OptionDetails("Plan single GEMMs instead of a model.", metavar="TYPE:N:K[:GROUPS]")
    )
    calls: Path | None = option(
        None,
        OptionDetails(
            "Plan the calls in a recording of runner record or runner rehearse instead of a model."
        ),
    )
    max_m: int | None = option(
        None, OptionDetails(f"Largest M of --gemm.  [default: {_MAX_M}]", metavar="N")
    )

    def __post_init__(self) -> None:
        if self.max_m is not None and not self.gemm:
            raise UserError("--max-m goes with --gemm only: a deployment's limit is --max-tokens")
        if self.calls is not None and self.gemm:
            raise UserError("--calls and --gemm both say what is run: give one")

    @property
    def most_sms(self) -> int | None:
        """The largest of the SM counts, if any was given."""
        return max(self.num_sms) if self.num_sms else None


def planned(
    options: PlannedOptions,
    given: ScenarioOptions,
    environ: Environ,
    target: Target,
    **fixed: object,
) -> Planned:
    """Plan what the options name; ``fixed`` sets scenario fields that are not options here.

    Raises:
        UserError: options that contradict each other or the model.
    """
    if options.calls is not None:
        return _planned_calls(options.calls, given, target)
    counts = tuple(dict.fromkeys(options.num_sms or (target.gpu.num_sms,)))
    if options.gemm:
        return _planned_gemms(options, given, counts, target)
    scenario = given.scenario(
        environ, num_sms=counts[0], reduced_num_sms=counts[1:], source=target.source, **fixed
    )
    return Planned(scenario, _title(scenario), plan_of(scenario))


def _planned_gemms(
    options: PlannedOptions, given: ScenarioOptions, counts: tuple[int, ...], target: Target
) -> Planned:
    context = click.get_current_context()
    for item in given.options:
        if context.get_parameter_source(item.name) is ParameterSource.COMMANDLINE:
            raise UserError(f"{item.flag} does not go with --gemm")
    max_m = _MAX_M if options.max_m is None else options.max_m
    wanted: dict[Demand, None] = {}
    for spec in options.gemm:
        for count in counts:
            found = gemm_demands(spec, max_m=max_m, num_sms=count)
            wanted.update(dict.fromkeys(found))
    title = f"{', '.join(options.gemm)}: M up to {max_m}, {_sms(counts)}"
    return Planned(None, title, make_plan(wanted, target.source.table(lambda: wanted)))


def _planned_calls(path: Path, given: ScenarioOptions, target: Target) -> Planned:
    context = click.get_current_context()
    for item in given.options:
        from_user = context.get_parameter_source(item.name) is ParameterSource.COMMANDLINE
        if from_user and item.name != "max_tokens":
            raise UserError(f"{item.flag} does not go with --calls: the calls say what is run")
    recording = read_recording(path)
    source = context.get_parameter_source("max_tokens")
    max_tokens = given.given["max_tokens"]
    if source is not ParameterSource.COMMANDLINE or not isinstance(max_tokens, int):
        max_tokens = recording.most_rows
    if not 1 <= max_tokens <= MAX_TOKENS:
        raise UserError(f"max-tokens {max_tokens} must lie in 1..{MAX_TOKENS}")
    return plan_calls(recording, max_tokens, target)


def _title(scenario: Scenario) -> str:
    model, parallel = scenario.model, scenario.parallel
    ep = (", ep" if parallel.ep else "") + (", a2a" if parallel.moe_a2a else "")
    cp = f", attn_cp {parallel.attn_cp}" if parallel.attn_cp > 1 else ""
    text = (
        f"{model.name}, {counted(model.num_hidden_layers, 'layer')}: "
        f"pp {parallel.pp} x tp {parallel.tp}"
        f"{ep}{cp}, forwards of up to {scenario.max_tokens} tokens, "
        f"{_sms((scenario.num_sms, *scenario.reduced_num_sms))}"
    )
    if scenario.disaggregation is not DisaggregationMode.NONE:
        text += f", {scenario.disaggregation.value} only"
    if scenario.decode_batch_sizes is not None:
        text += f", DECODE of {','.join(map(str, scenario.decode_batch_sizes))}"
    if scenario.bf16_fp32_algo is not Bf16Fp32Algo.DEEP_GEMM:
        text += f", bf16 -> fp32 GEMMs by {scenario.bf16_fp32_algo.value}"
    if scenario.without:
        text += f", without {', '.join(sorted(kind.name.lower() for kind in scenario.without))}"
    return text


def _sms(counts: tuple[int, ...]) -> str:
    return f"{' and '.join(map(str, counts))} SMs"
