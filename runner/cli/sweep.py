"""``runner sweep``: start-up time and coverage of many layouts, machines and policies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import click

from runner.config.environ import Environ, available_cores
from runner.config.fields import OptionDetails, option
from runner.config.warmup import WarmupPolicy
from runner.errors import UserError, WorkFailedError
from runner.files import write_json
from runner.options import ScenarioOptions, options_of, scenario_options, with_options
from runner.planning.plan import with_one_table
from runner.report.outputs import check_outputs
from runner.report.progress import counting, progress
from runner.report.sweep_table import print_sweep, sweep_json
from runner.standin.gpus import gpu_named
from runner.target import LibraryOptions, target_of
from sim.costs.profile import Profile, load_profile
from sim.machine import MachineOptions, gpu_of, with_walk_memory
from sim.sweep.points import (
    AXES,
    Point,
    Result,
    Skipped,
    Sweep,
    by_start_up,
    count_reasons,
)
from sim.sweep.run import Case, Ended, run_cases


@dataclass(frozen=True, kw_only=True)
class AxisOptions:
    """Lists of values; each combination of them is a point."""

    pp: tuple[int, ...] = option((4,), OptionDetails("Pipeline stages.  [default: 4]", listed=True))
    tp: tuple[int, ...] = option(
        (2,), OptionDetails("Tensor-parallel ranks.  [default: 2]", listed=True)
    )
    ep: tuple[str, ...] = option(
        ("off",),
        OptionDetails(
            "Whole experts per rank, or slices.  [default: off]",
            choices=("off", "on"),
            listed=True,
        ),
    )
    nodes: tuple[int, ...] = option(
        (),
        OptionDetails(
            "Nodes; ranks of a node share its cores and disk cache.  [default: one per stage]",
            listed=True,
        ),
    )
    cores: tuple[int, ...] = option(
        (), OptionDetails("CPU cores of a node.  [default: the profile's]", listed=True)
    )
    warmup: tuple[WarmupPolicy, ...] = option(
        (WarmupPolicy.NONE, WarmupPolicy.PP_PARALLEL, WarmupPolicy.PLANNED),
        OptionDetails(
            f"Policies, from {', '.join(policy.value for policy in WarmupPolicy)}.  [default: "
            "none,pp-parallel,planned]",
            metavar="POLICY,...",
            listed=True,
        ),
    )

    def points(self, profile: Profile) -> list[Point]:
        """Every combination once; those of one layout, which share a plan, are adjacent."""
        points = (
            Point(policy=policy, pp=pp, tp=tp, ep=ep == "on", nodes=nodes, cores=cores)
            for pp, tp, ep in product(self.pp, self.tp, self.ep)
            for nodes in self.nodes or (pp,)
            for cores, policy in product(self.cores or (profile.cores_per_node,), self.warmup)
        )
        return list(dict.fromkeys(points))


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """How to simulate and show the points."""

    jobs: int | None = option(
        None, OptionDetails("Number of simulating processes.  [default: one per core]", least=1)
    )
    all: bool = option(
        False,
        OptionDetails("Show every point, not only the frontier and the 20 fastest others."),
    )
    json: Path | None = option(
        None, OptionDetails("Write every point as JSON (- for stdout, and nothing else).")
    )
    plot: Path | None = option(
        None, OptionDetails("Draw start-up time against coverage (.png or .svg).")
    )


@click.command()
@with_options(
    scenario_options(
        "model", "deployment", "run", "placement", without=("pp", "tp", "ep", "nodes")
    ),
    AxisOptions,
    LibraryOptions,
    options_of(MachineOptions, without=("cores",)),
    SweepOptions,
)
def sweep(
    given: ScenarioOptions,
    axes: AxisOptions,
    library: LibraryOptions,
    machine: MachineOptions,
    options: SweepOptions,
) -> None:
    """Simulate every combination of the lists; show the frontier of start-up time and coverage."""
    check_outputs(plot=options.plot, others=(options.json,))
    cases, skipped = _cases(given, axes, library, machine)
    ended: list[Ended] = []
    stopped: KeyboardInterrupt | WorkFailedError | None = None
    try:
        if cases:
            _run(cases, options.jobs or available_cores(), ended)
    except (KeyboardInterrupt, WorkFailedError) as error:
        stopped = error
    by_point = {item.point: item for item in ended}
    found = [by_point[case.point] for case in cases if case.point in by_point]
    skipped += [item for item in found if isinstance(item, Skipped)]
    results = [item for item in found if isinstance(item, Result)]
    if stopped is None and not results:
        raise _none_fits(skipped)
    result = Sweep(
        settings=_settings(cases[0]),
        results=tuple(by_start_up(results)),
        skipped=tuple(skipped),
        unfinished=tuple(case.point for case in cases if case.point not in by_point),
    )
    _report(result, options)
    if stopped is not None:
        raise stopped


def _cases(
    given: ScenarioOptions, axes: AxisOptions, library: LibraryOptions, machine: MachineOptions
) -> tuple[list[Case], list[Skipped]]:
    """Sort the combinations into those that fit and those that do not.

    Raises:
        UserError: options that contradict each other, the model or the profile.
    """
    environ, profile = Environ.read(os.environ), load_profile(machine.hardware)
    given.model  # noqa: B018  # Report a bad model once, not for each point.
    cases: list[Case] = []
    skipped: list[Skipped] = []
    with progress("ask the library") as shown:
        gpu = gpu_named(library.gpu or gpu_of(profile))
        target = target_of(library, gpu, environ, progress=counting(shown))
        fixed = {"num_sms": target.gpu.num_sms, "source": target.source}
        for point in axes.points(profile):
            there = replace(machine, cores=point.cores).machine(profile)
            try:
                scenario = given.scenario(environ, **fixed, **vars(point))
                scenario = with_walk_memory(scenario, profile)
            except UserError as error:
                skipped.append(Skipped(point, str(error)))
            else:
                cases.append(Case(point, scenario, there))
        scenarios = with_one_table(case.scenario for case in cases)
    pairs = zip(cases, scenarios, strict=True)
    return [replace(case, scenario=scenario) for case, scenario in pairs], skipped


def _run(cases: Sequence[Case], jobs: int, ended: list[Ended]) -> None:
    """Simulate; each result goes into ``ended`` at once, so that it survives an interruption."""
    with progress("sweep") as shown:
        count = counting(shown)

        def on_end(item: Ended) -> None:
            ended.append(item)
            count(len(ended), len(cases))

        run_cases(cases, jobs=jobs, on_end=on_end)


def _none_fits(skipped: Sequence[Skipped]) -> UserError:
    (first, _), *others = count_reasons(skipped)
    if len(skipped) == 1:
        return UserError(first)
    more = f"; other reasons: {len(others)}" if others else ""
    return UserError(f"none of {len(skipped)} combinations fits: {first}{more}")


def _settings(case: Case) -> dict[str, object]:
    """A Timeline's metadata of the scenario, except the axes, and of the machine."""
    meta, machine = case.scenario.timeline_meta(), case.machine
    return {
        **{name: value for name, value in meta.items() if name not in (*AXES, "ranks")},
        "hardware": machine.profile.name,
        "link": machine.link,
        "ranks_per_gpu": machine.ranks_per_gpu,
        "nccl_timeout": machine.nccl_timeout,
    }


def _report(result: Sweep, options: SweepOptions) -> None:
    to_stdout = str(options.json) == "-"
    if not to_stdout:
        print_sweep(result, show_all=options.all)
    if options.json is not None:
        write_json(options.json, sweep_json(result), indent=1)
    if options.plot is not None and result.results:
        from runner.report.sweep_plot import plot_sweep

        plot_sweep(options.plot, result)
        if not to_stdout:
            print(f"wrote {options.plot}")
