"""``runner sweep``: many layouts, machines and policies, start-up time against coverage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from runner.cli.common import IntList, model_options
from runner.cli.simulated import machine_of, model_of, scenario_of, simulation_options, with_environ
from runner.cli.sweep_options import axis_options, take_axes
from runner.cli.target import Target, take_target
from runner.config.environ import Environ, available_cores
from runner.errors import UserError, WorkFailedError
from runner.files import write_json
from runner.planning.plan import with_one_table
from runner.report.outputs import check_outputs
from runner.report.progress import counting, progress
from runner.report.sweep_json import sweep_json
from runner.report.sweep_table import print_sweep
from sim.costs.profile import Profile, load_profile
from sim.sweep.points import AXES, Axes, Result, Skipped, Sweep, by_start_up, reasons
from sim.sweep.run import Case, Ended, WorkerLostError, run_cases


@click.command()
@model_options
@axis_options(pp=4, tp=2)
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
def sweep(
    jobs: int | None, show_all: bool, json_path: Path | None, plot: Path | None, **values: Any
) -> None:
    """Simulate every combination of lists; show the frontier of start-up time and coverage."""
    check_outputs(timeline=None, trace=None, plot=plot, others=(json_path,))
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs} must be at least 1")
    profile = load_profile(values.pop("hardware"))
    environ = Environ.read(os.environ)
    values = with_environ(values, environ)
    axes = take_axes(values, cores=profile.cores_per_node)
    with progress("ask the library") as shown:
        target = take_target(
            {**values, "hardware": profile.name}, environ, progress=counting(shown)
        )
        cases, skipped = _cases(axes, profile, values, target)
    if not cases:
        raise _none_fits(skipped)
    ended: list[Ended] = []
    stopped: KeyboardInterrupt | WorkFailedError | None = None
    try:
        _run(cases, jobs or available_cores(), ended)
    except KeyboardInterrupt as interrupt:
        stopped = interrupt
    except WorkerLostError as error:
        stopped = WorkFailedError(f"{error}: try fewer --jobs")
    result = _gathered(cases, skipped, ended)
    if stopped is None and not result.results:
        raise _none_fits(result.skipped)
    _report(result, show_all=show_all, json_path=json_path, plot=plot)
    if stopped is not None:
        raise stopped


def _cases(
    axes: Axes, profile: Profile, values: dict[str, Any], target: Target
) -> tuple[list[Case], list[Skipped]]:
    """The combinations that fit, and the others."""
    model = model_of(values)
    cases: list[Case] = []
    skipped: list[Skipped] = []
    for point in axes.points():
        chosen = {**values, **vars(point)}
        machine = machine_of(profile, chosen)
        try:
            scenario = scenario_of(point.policy, model, profile, chosen, target)
        except UserError as error:
            skipped.append(Skipped(point, str(error)))
        else:
            cases.append(Case(point, scenario, machine))
    scenarios = with_one_table(case.scenario for case in cases)
    cases = [replace(case, scenario=made) for case, made in zip(cases, scenarios, strict=True)]
    return cases, skipped


def _none_fits(skipped: Sequence[Skipped]) -> UserError:
    (first, _), *others = reasons(skipped)
    if len(skipped) == 1:
        return UserError(first)
    more = f"; other reasons: {len(others)}" if others else ""
    return UserError(f"none of {len(skipped)} combinations fits: {first}{more}")


def _run(cases: Sequence[Case], jobs: int, ended: list[Ended]) -> None:
    """Simulate; what ends is in ``ended`` at once, so that it outlives an interruption."""
    with progress("sweep") as shown:
        count = counting(shown)

        def on_end(item: Ended) -> None:
            ended.append(item)
            count(len(ended), len(cases))

        run_cases(cases, jobs=jobs, on_end=on_end)


def _gathered(cases: Sequence[Case], skipped: Sequence[Skipped], ended: Sequence[Ended]) -> Sweep:
    """Everything in the order of the points, whatever order it ended in."""
    by_point = {item.point: item for item in ended}
    ordered = [by_point[case.point] for case in cases if case.point in by_point]
    return Sweep(
        settings=_settings(cases[0]),
        results=tuple(by_start_up(item for item in ordered if isinstance(item, Result))),
        skipped=(*skipped, *(item for item in ordered if isinstance(item, Skipped))),
        unfinished=tuple(case.point for case in cases if case.point not in by_point),
    )


def _settings(case: Case) -> dict[str, Any]:
    """What a run's Timeline would say of the scenario, but for the axes, and of the machine."""
    meta, machine = case.scenario.timeline_meta(), case.machine
    return {
        **{name: value for name, value in meta.items() if name not in (*AXES, "ranks")},
        "speculative": case.scenario.speculative,
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
