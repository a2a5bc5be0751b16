"""``runner sweep``: many layouts, machines and policies, start-up time against coverage."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import click

from runner.cli.common import F, IntList, model_options
from runner.cli.guard import WorkFailedError
from runner.cli.progress import counting, progress
from runner.cli.simulated import machine_of, model_of, scenario_of, simulation_options, with_environ
from runner.cli.target import take_target
from runner.config.environ import Environ, available_cores
from runner.driver.warmup import WarmupPolicy
from runner.errors import UserError
from runner.files import write_json
from runner.report.outputs import check_outputs
from runner.report.sweep_table import print_sweep, sweep_json
from runner.scenario import run_meta, with_one_table
from sim.costs.profile import Profile, load_profile
from sim.sweep.points import AXES, Axes, Result, Skipped, Sweep, by_start_up, count_reasons
from sim.sweep.run import Case, Ended, WorkerLostError, run_cases

_POLICIES = [policy.value for policy in WarmupPolicy]


class ChoiceList(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """Comma-separated words, each out of a few."""

    name = "WORD,..."

    def __init__(self, *choices: str) -> None:
        self._choices = choices

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        words = value if isinstance(value, tuple) else tuple(str(value).split(","))
        for word in words:
            if word not in self._choices:
                self.fail(f"{word!r} must be one of {', '.join(self._choices)}", param, ctx)
        return words


def _axis(
    name: str, kind: IntList | ChoiceList, words: str, default: str | None = None
) -> Callable[[F], F]:
    """An option whose lists can also come in several options: the last one must not win."""
    shown = "" if default is None else f"  [default: {default}]"
    defaults = None if default is None else [default]
    return click.option(name, type=kind, multiple=True, help=words + shown, default=defaults)


@click.command()
@model_options
@_axis("--pp", IntList(), "Pipeline stages.", "4")
@_axis("--tp", IntList(), "Tensor-parallel ranks.", "2")
@_axis("--ep", ChoiceList("off", "on"), "Whole experts per rank, or slices.", "off")
@_axis(
    "--nodes",
    IntList(),
    "Nodes; the ranks of one share its cores and disk cache.  [default: one a stage]",
)
@_axis("--cores", IntList(), "CPU cores of a node.  [default: the profile's]")
@_axis(
    "--warmup",
    ChoiceList(*_POLICIES),
    f"Policies, out of {', '.join(_POLICIES)}.",
    "none,pp-parallel,planned",
)
@click.option(
    "--attn-cp",
    type=int,
    default=1,
    show_default=True,
    help="Split EXTEND tokens of the attention over so many ranks.",
)
@click.option("--stage-layers", type=IntList(), help="Layers of each stage.  [default: even]")
@simulation_options
@click.option("--jobs", type=int, help="Processes that simulate.  [default: one a core]")
@click.option(
    "--all",
    "show_all",
    is_flag=True,
    help="Show every point, not only the frontier and the 20 fastest others.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    help="Write every point as JSON (- for stdout, and nothing else).",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw start-up time against coverage (.png or .svg).",
)
@click.pass_context
def sweep(
    context: click.Context,
    /,
    jobs: int | None,
    show_all: bool,
    json_path: Path | None,
    plot: Path | None,
    **_: object,
) -> None:
    """Simulate every combination of lists; show the frontier of start-up time and coverage."""
    check_outputs(timeline=None, trace=None, plot=plot, others=(json_path,))
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs} must be at least 1")
    cases, skipped = _cases(context)
    ended: list[Ended] = []
    stopped: KeyboardInterrupt | WorkFailedError | None = None
    try:
        if cases:
            _run(cases, jobs or available_cores(), ended)
    except KeyboardInterrupt as interrupt:
        stopped = interrupt
    except WorkerLostError as error:
        stopped = WorkFailedError(f"{error}: try fewer --jobs")
    found = _in_order(cases, ended)
    skipped += [item for item in found if isinstance(item, Skipped)]
    results = [item for item in found if isinstance(item, Result)]
    if stopped is None and not results:
        raise _none_fits(skipped)
    reached = {item.point for item in ended}
    result = Sweep(
        settings=_settings(cases[0]),
        results=tuple(by_start_up(results)),
        skipped=tuple(skipped),
        unfinished=tuple(case.point for case in cases if case.point not in reached),
    )
    _report(result, show_all=show_all, json_path=json_path, plot=plot)
    if stopped is not None:
        raise stopped


def _cases(context: click.Context) -> tuple[list[Case], list[Skipped]]:
    """The combinations that fit, and the others.

    Raises:
        UserError: options that contradict each other, the model or the profile.
    """
    environ = Environ.read(os.environ)
    values = with_environ(context.params, environ)
    profile = load_profile(values["hardware"])
    points = _axes(context, profile).points()
    cases: list[Case] = []
    skipped: list[Skipped] = []
    with progress("ask the library") as shown:
        target = take_target(
            {**values, "hardware": profile.name}, environ, progress=counting(shown)
        )
        model = model_of(values)
        for point in points:
            chosen = {**values, **vars(point)}
            machine = machine_of(profile, chosen)
            try:
                scenario = scenario_of(point.policy, model, profile, chosen, target)
            except UserError as error:
                skipped.append(Skipped(point, str(error)))
            else:
                cases.append(Case(point, scenario, machine))
        scenarios = with_one_table(case.scenario for case in cases)
    pairs = zip(cases, scenarios, strict=True)
    return [replace(case, scenario=scenario) for case, scenario in pairs], skipped


def _axes(context: click.Context, profile: Profile) -> Axes:
    """The axes that the options give.

    Raises:
        UserError: a number below 1.
    """
    names = ("pp", "tp", "nodes", "cores", "ep", "warmup")
    lists = {name: [*chain(*context.params[name])] for name in names}
    for name in names[:4]:
        for number in lists[name]:
            if number < 1:
                raise UserError(f"--{name} {number} must be at least 1")
    return Axes(
        policies=[WarmupPolicy(name) for name in lists["warmup"]],
        pp=lists["pp"],
        tp=lists["tp"],
        ep=[word == "on" for word in lists["ep"]],
        nodes=lists["nodes"] or None,
        cores=lists["cores"] or [profile.cores_per_node],
    )


def _run(cases: Sequence[Case], jobs: int, ended: list[Ended]) -> None:
    """Simulate; what has ended is in ``ended`` at once, so that it outlives an interruption."""
    with progress("sweep") as shown:
        count = counting(shown)

        def on_end(item: Ended) -> None:
            ended.append(item)
            count(len(ended), len(cases))

        run_cases(cases, jobs=jobs, on_end=on_end)


def _in_order(cases: Sequence[Case], ended: Sequence[Ended]) -> list[Ended]:
    """Results in the order of the points, whatever order they ended in."""
    by_point = {item.point: item for item in ended}
    return [by_point[case.point] for case in cases if case.point in by_point]


def _none_fits(skipped: Sequence[Skipped]) -> UserError:
    (first, _), *others = count_reasons(skipped)
    if len(skipped) == 1:
        return UserError(first)
    more = f"; other reasons: {len(others)}" if others else ""
    return UserError(f"none of {len(skipped)} combinations fits: {first}{more}")


def _settings(case: Case) -> dict[str, object]:
    """What a run's Timeline would say of the scenario, except the axes, and of the machine."""
    meta, machine = run_meta(case.scenario), case.machine
    return {
        **{name: value for name, value in meta.items() if name not in (*AXES, "ranks")},
        "hardware": machine.profile.name,
        "link": machine.link,
        "ranks_per_gpu": machine.ranks_per_gpu,
        "nccl_timeout": machine.nccl_timeout,
    }


def _report(result: Sweep, *, show_all: bool, json_path: Path | None, plot: Path | None) -> None:
    to_stdout = str(json_path) == "-"
    if not to_stdout:
        print_sweep(result, show_all=show_all)
    if json_path is not None:
        write_json(json_path, sweep_json(result), indent=1)
    if plot is not None and result.results:
        from runner.report.sweep_plot import plot_sweep

        plot_sweep(plot, result)
        if not to_stdout:
            print(f"wrote {plot}")
