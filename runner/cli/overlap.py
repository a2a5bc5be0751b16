"""``runner overlap``: what strategies of two-batch overlap are worth, and the best placement."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.cli.common import layout_options, model_options
from runner.cli.simulated import link_of, model_of
from runner.config.environ import Environ
from runner.config.parallel import ParallelConfig
from runner.errors import UserError
from runner.files import write_json, write_text
from runner.model.strategy import STRATEGIES, OverlapStrategy, load_strategy
from runner.report.console import make_console
from runner.report.outputs import check_outputs
from runner.report.overlap_plot import plot_turns
from runner.report.overlap_table import print_comparison
from runner.report.progress import counting, progress
from runner.scenario import Scenario
from sim.costs.profile import load_profile
from sim.costs.profile_costs import ProfileCosts
from sim.overlap.compare import Comparison, compare
from sim.overlap.measured import MeasuredSteps, read_steps
from sim.overlap.validation import judge, judged_table

_BATCH = {ForwardMode.DECODE: 4096, ForwardMode.EXTEND: 16384}
"""Tokens of a forward unless given: of large servers, which overlap is for."""


@click.command()
@model_options
@layout_options(pp=1, tp=8)
@click.option(
    "--mode",
    type=click.Choice([mode.value for mode in ForwardMode]),
    default=ForwardMode.DECODE.value,
    show_default=True,
    help="Which forwards.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=2),
    metavar="N",
    help="Tokens of the forward: sequences, of a decode.  [default: 4096; 16384 of an extend]",
)
@click.option(
    "--prompt-len",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    metavar="N",
    help="Tokens of each sequence: before a decode, or in an extend.",
)
@click.option(
    "--overlap",
    multiple=True,
    metavar="STRATEGY",
    help=f"What to compare: {', '.join(STRATEGIES)}, or a file.  [default: the mode's]",
)
@click.option(
    "--stage", type=click.IntRange(min=0), default=0, show_default=True, help="Pipeline stage."
)
@click.option("--hardware", default="h200", show_default=True, help="Profile name or file.")
@click.option("--link", default="nvlink", show_default=True, help="One of the profile's links.")
@click.option(
    "--measured",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Show steps beside that launch.steps measured; its settings are taken.",
)
@click.option("--no-search", is_flag=True, help="Compare only.")
@click.option("--per-layer", is_flag=True, help="Show each layer's exposed communication.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    help="Write the figures as JSON (- for stdout, and nothing else).",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw two layers of each as a Gantt picture (.png or .svg).",
)
@click.option(
    "--save",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the best placement as a file that --overlap takes.",
)
def overlap(
    overlap: Sequence[str],
    measured: Path | None,
    no_search: bool,
    per_layer: bool,
    json_path: Path | None,
    plot: Path | None,
    save: Path | None,
    **values: Any,
) -> None:
    """Compare strategies of two-batch overlap, and search all placements for the best."""
    _check_outputs(json_path, plot, save)
    if not no_search and find_spec("numpy") is None:
        raise UserError(
            "the search for the best placement needs numpy: pip install "
            "'deepgemm-coldstart[search]', or give --no-search"
        )
    if save is not None and no_search:
        raise UserError("--save writes what the search finds: it does not go with --no-search")
    steps = None if measured is None else read_steps(measured)
    if steps is not None:
        values.update(_settings_of(steps, overlap))
    mode = ForwardMode(values["mode"])
    values["batch"] = values["batch"] or _BATCH[mode]
    strategies = _strategies(overlap, mode) if steps is None else steps.strategies
    case = _case(mode, strategies, values)
    comparison = case.compared(searched=not no_search)
    rows = [] if steps is None else judge(case.scenario, case.rank, case.batch, steps, comparison)
    if json_path is not None:
        data = {"version": 1, **_meta(values), **comparison.to_json()}
        data |= {"measured": [row.to_json() for row in rows]} if rows else {}
        write_json(json_path, data, indent=1)
    quiet = json_path is not None and str(json_path) == "-"
    if not quiet:
        console = make_console()
        print_comparison(comparison, _title(values), console, per_layer=per_layer)
        if steps is not None:
            console.print(judged_table(rows, steps.machine))
    if plot is not None:
        plot_turns(plot, comparison, _title(values))
    if save is not None:
        best = comparison.best.strategy
        assert best is not None
        write_text(save, best.to_toml())
    for path in (json_path, plot, save):
        if path is not None and not quiet:
            print(f"wrote {path}")


def _check_outputs(json_path: Path | None, plot: Path | None, save: Path | None) -> None:
    check_outputs(timeline=None, trace=None, plot=plot, others=(json_path, save))
    given = [path for path in (json_path, plot, save) if path is not None and str(path) != "-"]
    for path in given:
        if given.count(path) > 1:
            raise UserError(f"{path} is asked for twice: give each output a file of its own")
    if str(save) == "-":
        raise UserError("--save needs a file: - is only for JSON outputs")


def _settings_of(steps: MeasuredSteps, overlap: Sequence[str]) -> dict[str, Any]:
    """What a file of measured steps says of its runs, instead of the options."""
    if overlap:
        raise UserError("--overlap does not go with --measured, which brings its strategies")
    return steps.settings


def _strategies(names: Sequence[str], mode: ForwardMode) -> list[OverlapStrategy]:
    if not names:
        return [strategy for strategy in STRATEGIES.values() if strategy.mode is mode]
    found: dict[str, OverlapStrategy] = {}
    for name in dict.fromkeys(names):
        strategy = load_strategy(name)
        if strategy.mode is not mode:
            raise UserError(
                f"--overlap {strategy.name} is for {strategy.mode.value}, not for --mode "
                f"{mode.value}"
            )
        if strategy.name in found:
            raise UserError(f"two strategies are called {strategy.name}: rename a file")
        found[strategy.name] = strategy
    return [*found.values()]


@dataclass(frozen=True)
class _Case:
    """What is compared."""

    scenario: Scenario
    rank: int
    batch: ForwardBatch
    costs: ProfileCosts
    strategies: Sequence[OverlapStrategy]

    def compared(self, *, searched: bool) -> Comparison:
        with progress("search") if searched else nullcontext() as show:
            tell = None if show is None else counting(show)
            return compare(self.scenario, self.rank, self.batch, self.costs, self.strategies, tell)


def _case(
    mode: ForwardMode, strategies: Sequence[OverlapStrategy], values: dict[str, Any]
) -> _Case:
    environ = Environ.read(os.environ)
    profile = load_profile(values["hardware"])
    scenario = Scenario(
        model=model_of(values),
        parallel=_parallel(values, environ),
        num_sms=profile.num_sms,
        bf16_fp32_algo=environ.bf16_fp32_algo,
    )
    costs = ProfileCosts(profile, link_of(profile, values["link"]), profile.cores_per_node)
    rank = scenario.parallel.rank_of(values["stage"], 0)
    batch = _batch(mode, values["batch"], values["prompt_len"])
    return _Case(scenario, rank, batch, costs, strategies)


def _parallel(values: dict[str, Any], environ: Environ) -> ParallelConfig:
    if values["attn_cp"] != 1:
        raise UserError(
            f"--attn-cp {values['attn_cp']} must be 1: around overlapped experts the tokens are "
            "split over all ranks"
        )
    parallel = ParallelConfig(
        pp=values["pp"],
        tp=values["tp"],
        ep=values["ep"],
        moe_a2a=True,
        stage_layers=values["stage_layers"] or environ.stage_layers,
    )
    if parallel.tp < 2:
        raise UserError(f"--tp {parallel.tp} must be at least 2: one rank has nothing to wait for")
    if values["stage"] >= parallel.pp:
        raise UserError(f"--stage {values['stage']} must be below --pp {parallel.pp}")
    return parallel


def _batch(mode: ForwardMode, tokens: int, prompt_len: int) -> ForwardBatch:
    if not mode.is_extend:
        return ForwardBatch.decode((prompt_len + 1,) * tokens)
    full, rest = divmod(tokens, prompt_len)
    return ForwardBatch.extend((prompt_len,) * full + ((rest,) if rest else ()))


_SETTINGS = (
    "model",
    "layers",
    "pp",
    "tp",
    "ep",
    "stage_layers",
    "stage",
    "mode",
    "batch",
    "prompt_len",
    "hardware",
    "link",
)


def _meta(values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in _SETTINGS}


def _title(values: dict[str, Any]) -> str:
    ep = ", ep" if values["ep"] else ""
    what = "sequences after" if values["mode"] == "decode" else "tokens in prompts of"
    layers = "" if values["layers"] is None else f", {values['layers']} layers"
    layout = f"pp {values['pp']} x tp {values['tp']}{ep}"
    return (
        f"{values['model']}{layers}, {layout}: {values['mode']} of {values['batch']} {what} "
        f"{values['prompt_len']} tokens, {values['hardware']}, {values['link']}"
    )
