"""``runner overlap``: what strategies of two-batch overlap are worth, and the best placement."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import click

from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.cli.common import layout_options, model_options
from runner.cli.progress import counting, progress
from runner.cli.simulated import link_of, model_of
from runner.config.environ import Environ
from runner.config.parallel import ParallelConfig
from runner.driver.warmup import WarmupOptions, WarmupPolicy
from runner.errors import UserError
from runner.files import write_json, write_text
from runner.model.strategy import STRATEGIES, OverlapStrategy, load_strategy
from runner.report.console import make_console
from runner.report.outputs import check_outputs
from runner.report.overlap_plot import plot_turns
from runner.report.overlap_table import (
    comparison_json,
    print_comparison,
    validation_json,
    validation_table,
)
from runner.scenario import Scenario
from sim.costs.profile import Profile, load_profile
from sim.costs.profile_costs import ProfileCosts
from sim.overlap.compare import compare
from sim.overlap.forward import Forward
from sim.overlap.measured import read_steps, validate

_FILE = click.Path(path_type=Path, dir_okay=False)


@dataclass(frozen=True)
class OverlapOptions:
    """The command's options."""

    model: str
    layers: int | None
    pp: int
    tp: int
    ep: bool
    stage_layers: tuple[int, ...] | None
    stage: int
    mode: str
    batch: int | None
    prompt_len: int
    hardware: str
    link: str
    attn_cp: int
    overlap: tuple[str, ...]
    measured: Path | None
    no_search: bool
    per_layer: bool
    json_path: Path | None
    plot: Path | None
    save: Path | None

    @property
    def tokens(self) -> int:
        """Tokens of the forward; by default as many as in large servers, which overlap is for."""
        return self.batch or (4096 if self.mode == ForwardMode.DECODE.value else 16384)

    @property
    def title(self) -> str:
        """What runs, in a line."""
        layers = "" if self.layers is None else f", {self.layers} layers"
        ep = ", ep" if self.ep else ""
        what = "sequences after" if self.mode == "decode" else "tokens in prompts of"
        return (
            f"{self.model}{layers}, pp {self.pp} x tp {self.tp}{ep}: {self.mode} of {self.tokens} "
            f"{what} {self.prompt_len} tokens, {self.hardware}, {self.link}"
        )

    def to_json(self) -> dict[str, object]:
        """What runs, as plain data."""
        names = [*vars(self)]
        values = {**vars(self), "batch": self.tokens}
        return {name: values[name] for name in names[: names.index("attn_cp")]}


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
    type=_FILE,
    help="Validate the prediction with steps that launch.steps measured, with their settings.",
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
    "--plot", type=_FILE, help="Draw two layers of each as a Gantt picture (.png or .svg)."
)
@click.option("--save", type=_FILE, help="Write the best placement as a file that --overlap takes.")
@click.pass_context
def overlap(context: click.Context, /, **_: object) -> None:
    """Compare strategies of two-batch overlap, and search all placements for the best."""
    options = OverlapOptions(**context.params)
    _check(options)
    measured = None if options.measured is None else read_steps(options.measured)
    if measured is not None:
        options = replace(options, **vars(measured.settings))
    strategies = _strategies(options) if measured is None else measured.strategies
    profile = load_profile(options.hardware)
    forward = _forward(options, profile)
    costs = ProfileCosts(profile, link_of(profile, options.link), profile.cores_per_node)
    with nullcontext() if options.no_search else progress("search") as shown:
        counted = None if shown is None else counting(shown)
        comparison = compare(forward, costs, strategies, counted)
    rows = [] if measured is None else validate(forward, measured, comparison)
    if options.json_path is not None:
        data = {"version": 1, **options.to_json(), **comparison_json(comparison)}
        data |= {"measured": [validation_json(row) for row in rows]} if rows else {}
        write_json(options.json_path, data, indent=1)
    quiet = str(options.json_path) == "-"
    if not quiet:
        console = make_console()
        print_comparison(comparison, options.title, console, per_layer=options.per_layer)
        if measured is not None:
            console.print(validation_table(rows, measured.machine))
    if options.plot is not None:
        plot_turns(options.plot, comparison, options.title)
    if options.save is not None and comparison.found is not None:
        write_text(options.save, comparison.found.best.to_toml())
    for path in (options.json_path, options.plot, options.save):
        if path is not None and not quiet:
            print(f"wrote {path}")


def _check(options: OverlapOptions) -> None:
    """Find contradictions before any work.

    Raises:
        UserError: an output that cannot be written, or options that contradict each other.
    """
    others = (options.json_path, options.save)
    check_outputs(timeline=None, trace=None, plot=options.plot, others=others)
    given = [path for path in (options.plot, *others) if path is not None]
    for path in given:
        if given.count(path) > 1:
            raise UserError(f"{path} is asked for twice: give each output a file of its own")
    if str(options.save) == "-":
        raise UserError("--save needs a file: - is only for JSON outputs")
    if not options.no_search and find_spec("numpy") is None:
        raise UserError(
            "the search for the best placement needs numpy: pip install "
            "'deepgemm-coldstart[search]', or give --no-search"
        )
    if options.save is not None and options.no_search:
        raise UserError("--save writes what the search finds: it does not go with --no-search")
    if options.measured is not None and options.overlap:
        raise UserError("--overlap does not go with --measured, which brings its strategies")


def _strategies(options: OverlapOptions) -> Sequence[OverlapStrategy]:
    mode = ForwardMode(options.mode)
    if not options.overlap:
        return [strategy for strategy in STRATEGIES.values() if strategy.mode is mode]
    found: dict[str, OverlapStrategy] = {}
    for strategy in map(load_strategy, dict.fromkeys(options.overlap)):
        if strategy.mode is not mode:
            raise UserError(
                f"--overlap {strategy.name} is for {strategy.mode.value}, not for --mode "
                f"{mode.value}"
            )
        if strategy.name in found:
            raise UserError(f"two strategies are called {strategy.name}: rename a file")
        found[strategy.name] = strategy
    return [*found.values()]


def _forward(options: OverlapOptions, profile: Profile) -> Forward:
    environ = Environ.read(os.environ)
    if options.attn_cp != 1:
        raise UserError(
            f"--attn-cp {options.attn_cp} must be 1: around overlapped experts the tokens are "
            "split over all ranks"
        )
    parallel = ParallelConfig(
        pp=options.pp,
        tp=options.tp,
        ep=options.ep,
        moe_a2a=True,
        stage_layers=options.stage_layers or environ.stage_layers,
    )
    if options.tp < 2:
        raise UserError(f"--tp {options.tp} must be at least 2: one rank has nothing to wait for")
    if options.stage >= options.pp:
        raise UserError(f"--stage {options.stage} must be below --pp {options.pp}")
    scenario = Scenario(
        model=model_of(vars(options)),
        parallel=parallel,
        warmup=WarmupOptions(policy=WarmupPolicy.NONE),
        num_sms=profile.num_sms,
        bf16_fp32_algo=environ.bf16_fp32_algo,
    )
    if options.mode == ForwardMode.DECODE.value:
        batch = ForwardBatch.decode((options.prompt_len + 1,) * options.tokens)
    else:
        full, rest = divmod(options.tokens, options.prompt_len)
        batch = ForwardBatch.extend((options.prompt_len,) * full + ((rest,) if rest else ()))
    return Forward(scenario, parallel.rank_of(options.stage, 0), batch)
