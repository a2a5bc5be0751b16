"""``runner overlap``: compare two-batch overlap strategies, and find the best placement."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import click

from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.config.environ import Environ
from runner.config.fields import OptionDetails, option, to_plain
from runner.driver.requests import prompt_lens
from runner.errors import UserError
from runner.files import write_json, write_text
from runner.model.strategy import STRATEGIES, OverlapStrategy, load_strategy
from runner.options import ScenarioOptions, scenario_options, with_options
from runner.report.console import make_console
from runner.report.outputs import check_outputs
from runner.report.overlap_plot import plot_turns
from runner.report.overlap_table import comparison_json, print_comparison, validation_table
from runner.report.progress import counting, progress
from sim.costs.profile import Profile, load_profile
from sim.costs.profile_costs import ProfileCosts
from sim.machine import link_of
from sim.overlap.compare import compare
from sim.overlap.forward import Forward
from sim.overlap.measured import StepSettings, read_steps, validate


@dataclass(frozen=True, kw_only=True)
class OverlapOptions:
    """Which forward to compare, on which hardware, and where to write the results."""

    mode: ForwardMode = option(ForwardMode.DECODE, OptionDetails("Mode of the forward."))
    batch: int | None = option(
        None,
        OptionDetails(
            "Tokens of the forward; in a decode, sequences.  [default: 4096; 16384 in an extend]",
            metavar="N",
            least=2,
        ),
    )
    prompt_len: int = option(
        1024,
        OptionDetails(
            "Tokens of each sequence: before a decode, or in an extend.", metavar="N", least=1
        ),
    )
    overlap: tuple[str, ...] = option(
        (),
        OptionDetails(
            f"What to compare: {', '.join(STRATEGIES)}, or a file.  [default: the mode's]",
            metavar="STRATEGY",
        ),
    )
    stage: int = option(0, OptionDetails("Pipeline stage.", least=0))
    hardware: str = option("h200", OptionDetails("Profile name or file."))
    link: str = option("nvlink", OptionDetails("One of the profile's links."))
    measured: Path | None = option(
        None,
        OptionDetails(
            "Validate the prediction against steps measured by launch.steps, with their settings."
        ),
    )
    no_search: bool = option(False, OptionDetails("Only compare; do not search."))
    per_layer: bool = option(False, OptionDetails("Show each layer's exposed communication."))
    json: Path | None = option(
        None, OptionDetails("Write the figures as JSON (- for stdout, and nothing else).")
    )
    plot: Path | None = option(
        None, OptionDetails("Draw two layers of each run as a Gantt picture (.png or .svg).")
    )
    save: Path | None = option(
        None, OptionDetails("Write the best placement to a file for --overlap.")
    )

    @property
    def tokens(self) -> int:
        """Tokens of the forward; the default is that of large servers, where overlap pays off."""
        return self.batch or (16384 if self.mode.is_extend else 4096)

    @property
    def forward_batch(self) -> ForwardBatch:
        """The forward's sequences."""
        if not self.mode.is_extend:
            return ForwardBatch.decode((self.prompt_len + 1,) * self.tokens)
        return ForwardBatch.extend(prompt_lens(self.tokens, self.prompt_len))

    def title(self, given: ScenarioOptions) -> str:
        """The forward, on one line."""
        values = given.given
        layers = "" if values["layers"] is None else f", {values['layers']} layers"
        ep = ", ep" if values["ep"] else ""
        what = "tokens in prompts of" if self.mode.is_extend else "sequences after"
        return (
            f"{values['model']}{layers}, pp {values['pp']} x tp {values['tp']}{ep}: "
            f"{self.mode.value} of {self.tokens} {what} {self.prompt_len} tokens, {self.hardware}, "
            f"{self.link}"
        )

    def to_json(self, given: ScenarioOptions) -> dict[str, object]:
        """The forward as plain data."""
        layout = ("model", "layers", "pp", "tp", "ep", "stage_layers")
        return {
            **{name: to_plain(given.given[name]) for name in layout},
            "stage": self.stage,
            "mode": self.mode.value,
            "batch": self.tokens,
            "prompt_len": self.prompt_len,
            "hardware": self.hardware,
            "link": self.link,
        }


@click.command()
@with_options(
    scenario_options(
        "model",
        "deployment",
        without=("overlap", "moe_a2a", "max_tokens", "disaggregation"),
        tp=8,
    ),
    OverlapOptions,
)
def overlap(given: ScenarioOptions, options: OverlapOptions) -> None:
    """Compare strategies of two-batch overlap, and search all placements for the best."""
    _check(options)
    measured = None if options.measured is None else read_steps(options.measured)
    if measured is not None:
        given, options = _with_settings(given, options, measured.settings)
    strategies = _strategies(options) if measured is None else measured.strategies
    profile = load_profile(options.hardware)
    forward = _forward(given, options, profile)
    costs = ProfileCosts(profile, link_of(profile, options.link), profile.cores_per_node)
    with nullcontext() if options.no_search else progress("search") as shown:
        counted = None if shown is None else counting(shown)
        comparison = compare(forward, costs, strategies, counted)
    rows = [] if measured is None else validate(forward, measured, comparison)
    if options.json is not None:
        data = {"version": 1, **options.to_json(given), **comparison_json(comparison)}
        data |= {"measured": rows} if rows else {}
        write_json(options.json, data, indent=1)
    quiet = str(options.json) == "-"
    if not quiet:
        console = make_console()
        print_comparison(comparison, options.title(given), console, per_layer=options.per_layer)
        if measured is not None:
            console.print(validation_table(rows, measured.machine))
    if options.plot is not None:
        plot_turns(options.plot, comparison, options.title(given))
    if options.save is not None and comparison.found is not None:
        write_text(options.save, comparison.found.best.to_toml())
    for path in (options.json, options.plot, options.save):
        if path is not None and not quiet:
            print(f"wrote {path}")


def _check(options: OverlapOptions) -> None:
    """Check the options before any work.

    Raises:
        UserError: an output that cannot be written, or options that contradict each other.
    """
    check_outputs(plot=options.plot, others=(options.json, options.save))
    if str(options.save) == "-":
        raise UserError("--save needs a file: - is only for JSON outputs")
    if not options.no_search and find_spec("numpy") is None:
        raise UserError(
            "the search for the best placement needs numpy: pip install "
            "'deepgemm-coldstart[search]', or give --no-search"
        )
    if options.save is not None and options.no_search:
        raise UserError("--save writes the search's result: it does not go with --no-search")
    if options.measured is not None and options.overlap:
        raise UserError("--overlap does not go with --measured, which has its own strategies")


def _strategies(options: OverlapOptions) -> Sequence[OverlapStrategy]:
    mode = options.mode
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
            raise UserError(f"two strategies are called {strategy.name}: rename one of the files")
        found[strategy.name] = strategy
    return [*found.values()]


def _with_settings(
    given: ScenarioOptions, options: OverlapOptions, settings: StepSettings
) -> tuple[ScenarioOptions, OverlapOptions]:
    """The options, with the measurement's settings in place of their own."""
    values = dict(vars(settings))
    of_scenario = {name: values.pop(name) for name in given.given if name in values}
    change: partial[OverlapOptions] = partial(replace, options)
    return replace(given, given={**given.given, **of_scenario}), change(**values)


def _forward(given: ScenarioOptions, options: OverlapOptions, profile: Profile) -> Forward:
    attn_cp = given.given["attn_cp"]
    if attn_cp != 1:
        raise UserError(
            f"--attn-cp {attn_cp} must be 1: overlapped experts need the tokens split over all "
            "ranks"
        )
    environ = Environ.read(os.environ)
    scenario = given.scenario(environ, moe_a2a=True, num_sms=profile.num_sms)
    parallel = scenario.parallel
    if parallel.tp < 2:
        raise UserError(f"--tp {parallel.tp} must be at least 2: a single rank never waits")
    if options.stage >= parallel.pp:
        raise UserError(f"--stage {options.stage} must be below --pp {parallel.pp}")
    return Forward(scenario, parallel.rank_of(options.stage, 0), options.forward_batch)
