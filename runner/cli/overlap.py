"""``runner overlap``: what strategies of two-batch overlap are worth, and the best placement."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from runner.cli.common import layout_options, model_options
from runner.cli.progress import counting, progress
from runner.cli.simulated import link_of, model_of
from runner.config.parallel import ParallelConfig
from runner.environ import Environ
from runner.errors import UserError
from runner.files import write_json, write_text
from runner.forward_batch import ForwardBatch, ForwardMode
from runner.model.strategy import STRATEGIES, OverlapStrategy, load_strategy
from runner.report.console import make_console
from runner.report.outputs import check_outputs
from runner.scenario import Scenario
from runner.warmup import WarmupOptions, WarmupPolicy
from sim.overlap.compare import Comparison, compare
from sim.profile import load_profile
from sim.profile_costs import ProfileCosts

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
@click.option("--stage", type=click.IntRange(min=0), default=0, show_default=True,
              help="Pipeline stage.")  # fmt: skip
@click.option("--hardware", default="h200", show_default=True, help="Profile name or file.")
@click.option("--link", default="nvlink", show_default=True, help="One of the profile's links.")
@click.option("--no-search", is_flag=True, help="Compare only.")
@click.option("--per-layer", is_flag=True, help="Show each layer's exposed communication.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    help="Write the figures as JSON (- for stdout, and nothing else).",
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False),
              help="Draw two layers of each as a Gantt picture (.png or .svg).")  # fmt: skip
@click.option("--save", type=click.Path(path_type=Path, dir_okay=False),
              help="Write the best placement as a file that --overlap takes.")  # fmt: skip
def overlap(
    overlap: Sequence[str], no_search: bool, per_layer: bool, json_path: Path | None,
    plot: Path | None, save: Path | None, **values: Any,
) -> None:  # fmt: skip
    """Compare strategies of two-batch overlap, and search all placements for the best."""
    check_outputs(timeline=None, trace=None, plot=plot, others=(json_path, save))
    if save is not None and no_search:
        raise UserError("--save writes what the search finds: it does not go with --no-search")
    mode = ForwardMode(values["mode"])
    values["batch"] = values["batch"] or _BATCH[mode]
    comparison = _compared(mode, _strategies(overlap, mode), values, searched=not no_search)
    if json_path is not None:
        write_json(json_path, {"version": 1, **_meta(values), **comparison.to_json()}, indent=1)
    quiet = json_path is not None and str(json_path) == "-"
    if not quiet:
        from sim.overlap.table import print_comparison

        print_comparison(comparison, _title(values), make_console(), per_layer=per_layer)
    if plot is not None:
        from sim.overlap.plot import plot_turns

        plot_turns(plot, comparison, _title(values))
    if save is not None:
        best = comparison.best.strategy
        assert best is not None
        write_text(save, best.to_toml())
    for path in (json_path, plot, save):
        if path is not None and not quiet:
            print(f"wrote {path}")


def _strategies(names: Sequence[str], mode: ForwardMode) -> list[OverlapStrategy]:
    if not names:
        return [strategy for strategy in STRATEGIES.values() if strategy.mode is mode]
    found = [load_strategy(name) for name in dict.fromkeys(names)]
    for strategy in found:
        if strategy.mode is not mode:
            raise UserError(
                f"--overlap {strategy.name} is for {strategy.mode.value}, not for --mode "
                f"{mode.value}"
            )
    return found


def _compared(
    mode: ForwardMode, strategies: list[OverlapStrategy], values: dict[str, Any], *, searched: bool
) -> Comparison:
    environ = Environ.read(os.environ)
    profile = load_profile(values["hardware"])
    scenario = Scenario(
        model=model_of(values),
        parallel=_parallel(values, environ),
        warmup=WarmupOptions(policy=WarmupPolicy.NONE),
        num_sms=profile.num_sms,
        bf16_fp32_algo=environ.bf16_fp32_algo,
    )
    costs = ProfileCosts(profile, link_of(profile, values["link"]), profile.cores_per_node)
    rank = scenario.parallel.rank_of(values["stage"], 0)
    batch = _batch(mode, values["batch"], values["prompt_len"])
    with progress("search") if searched else nullcontext() as show:
        tell = None if show is None else counting(show)
        return compare(scenario, rank, batch, costs, strategies, tell)


def _parallel(values: dict[str, Any], environ: Environ) -> ParallelConfig:
    if values["tp"] < 2:
        raise UserError(f"--tp {values['tp']} must be at least 2: one rank has nothing to wait for")
    if values["stage"] >= values["pp"]:
        raise UserError(f"--stage {values['stage']} must be below --pp {values['pp']}")
    return ParallelConfig(
        pp=values["pp"],
        tp=values["tp"],
        ep=values["ep"],
        moe_a2a=True,
        attn_cp=values["attn_cp"],
        stage_layers=values["stage_layers"] or environ.stage_layers,
    )


def _batch(mode: ForwardMode, tokens: int, prompt_len: int) -> ForwardBatch:
    if not mode.is_extend:
        return ForwardBatch.decode((prompt_len + 1,) * tokens)
    full, rest = divmod(tokens, prompt_len)
    return ForwardBatch.extend((prompt_len,) * full + ((rest,) if rest else ()))


_SETTINGS = ("model", "layers", "pp", "tp", "ep", "stage", "mode", "batch", "prompt_len",
             "hardware", "link")  # fmt: skip


def _meta(values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in _SETTINGS}


def _title(values: dict[str, Any]) -> str:
    ep = ", ep" if values["ep"] else ""
    what = "sequences after" if values["mode"] == "decode" else "tokens in prompts of"
    return (
        f"{values['model']}, pp {values['pp']} x tp {values['tp']}{ep}: {values['mode']} of "
        f"{values['batch']} {what} {values['prompt_len']} tokens, {values['hardware']}, "
        f"{values['link']}"
    )
