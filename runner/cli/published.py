"""``runner published``: predictions against start-ups that others published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from runner.cli.deployment import planned
from runner.cli.plan import costs_of, plan
from runner.cli.sim import predictions_of, sim
from runner.cli.target import take_target
from runner.config.environ import Environ
from runner.errors import UserError
from runner.files import write_json
from runner.report.plan_table import seconds_one_by_one
from sim.costs.profile import load_profile
from sim.published import (
    Compared,
    Figure,
    Row,
    SetUp,
    figure_of,
    read_published,
    summary,
    walk_cases,
)
from sim.published_table import (
    assumed_lines,
    compared_table,
    published_json,
    why_not_table,
)

_FILE = click.Path(path_type=Path)
_COMMANDS: Mapping[str, click.Command] = {"sim": sim, "plan": plan}
_NOT_OF_A_SET_UP = {
    "sim": {"hardware", "library", "json", "timeline", "trace", "plot"},
    "plan": {
        "hardware",
        "library",
        "json",
        "target-root",
        "cuda-version",
        "compiler-text",
        "check",
        "policy",
        "nodes",
        "stream",
        "walk-max-m",
    },
}
"""Options that say nothing about what is predicted, or that a set-up has elsewhere."""


@click.command()
@click.argument("file", required=False, type=_FILE)
@click.option("--brief", is_flag=True, help="Leave out what was assumed.")
@click.option(
    "--json", "json_path", type=_FILE, help="Write JSON here; - is stdout, without the tables."
)
def published(file: Path | None, brief: bool, json_path: Path | None) -> None:
    """Hold the shipped profiles against start-ups that others published.

    Each row's set-up runs through runner sim or runner plan. Deviations are from the nearer end of
    what was reported. FILE has rows of its own, in the form of sim/data/published_figures.json.
    """
    known = read_published(file)
    compared = [compare_row(row) for row in known.rows if row.set_up is not None]
    if json_path is not None:
        write_json(json_path, published_json(compared, known), indent=1)
    if str(json_path) == "-":
        return
    from runner.report.console import make_console

    console = make_console(highlight=False)
    if compared:
        console.print(compared_table(compared))
        console.print(summary(compared).line)
    if compared and not brief:
        print()
        for line in assumed_lines(compared, known, console.width):
            print(line)
    left = [row for row in known.rows if row.set_up is None]
    if left:
        console.print()
        console.print(why_not_table(left))


def compare_row(row: Row) -> Compared:
    """Predict a row's figure as its command would.

    Raises:
        UserError: a set-up that the command refuses, or that does not have the figure.
    """
    assert row.set_up is not None and row.figure is not None
    try:
        return _compared(row, row.figure, row.set_up)
    except UserError as error:
        raise UserError(f"row {row.id}: {error}") from None


def _compared(row: Row, figure: Figure, set_up: SetUp) -> Compared:
    context = options_of(set_up)
    profile = load_profile(set_up.hardware)
    environ = Environ.read(set_up.environment)
    if set_up.command == "plan":
        with context.scope():
            target = take_target(context.params, environ)
            kernels = planned(context.params, environ, target).plan
        if figure is Figure.CASES:
            return Compared(row, walk_cases(kernels), profile.estimate)
        seconds = seconds_one_by_one(kernels, costs_of(profile).compile_seconds)
        return Compared(row, seconds, profile.estimate)
    values = context.params
    policies = values.pop("policies")
    if len(policies) != 1:
        raise UserError(f"its set-up has {len(policies)} warm-ups: it must have one")
    _, (prediction,), _ = predictions_of(policies, values, environ)
    predicted = figure_of(figure, prediction)
    return Compared(row, predicted, profile.estimate, prediction.timeout is not None)


def options_of(set_up: SetUp) -> click.Context:
    """A context of the set-up's command with every option's value, as the command line makes it.

    Raises:
        UserError: an option or a value that the command does not take.
    """
    command = _COMMANDS[set_up.command]
    known = _option_names(command) - _NOT_OF_A_SET_UP[set_up.command]
    for name in set_up.options:
        if name not in known:
            raise UserError(f"{name!r} is no option that a set-up of runner {command.name} has")
    try:
        return command.make_context(command.name, set_up.arguments)
    except click.UsageError as error:
        raise UserError(error.format_message()) from None


def _option_names(command: click.Command) -> set[str]:
    return {
        text.removeprefix("--")
        for option in command.params
        for text in (*option.opts, *option.secondary_opts)
    }
