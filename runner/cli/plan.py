"""``runner plan``: exactly the kernels that a deployment can ever need."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import click

from runner.cli.calls import Planned, library_of
from runner.cli.deployment import PlannedOptions, planned
from runner.config.environ import Environ
from runner.config.fields import OptionDetails, option
from runner.config.warmup import WarmupPolicy
from runner.driver.run import record_parts
from runner.errors import UserError, WorkFailedError
from runner.files import write_json
from runner.kernels.rules import RULES, RULES_ARCH
from runner.options import ScenarioOptions, scenario_options, with_options
from runner.planning.coverage import Coverage, coverage
from runner.planning.library_check import differences
from runner.planning.plan import plan_to_json, use_to_json
from runner.recording.recording import read_recording
from runner.report.outputs import check_outputs
from runner.report.plan_table import Machine, print_coverage, print_plan, print_stalls
from runner.report.progress import counting, progress
from runner.standin.gpus import gpu_named
from runner.target import CompilerOptions, LibraryOptions, Target, target_of
from sim.costs.profile import Profile, load_profile
from sim.costs.profile_costs import ProfileCosts
from sim.machine import gpu_of, with_walk_memory


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What to print about the plan, and where to write it."""

    policy: WarmupPolicy | None = option(
        None, OptionDetails("Show what this warm-up policy leaves uncovered.")
    )
    hardware: str = option(
        "h200", OptionDetails("Profile for estimates of compile time and free memory.")
    )
    check: bool = option(
        False,
        OptionDetails(
            "Compare our rules with the library itself, M by M, and print every difference."
        ),
    )
    json: Path | None = option(
        None, OptionDetails("Write the plan as JSON (- for stdout, and nothing else).")
    )


@click.command()
@with_options(
    scenario_options("model", "deployment", "plan", "run", "placement", pp=4, tp=2),
    PlannedOptions,
    LibraryOptions,
    CompilerOptions,
    PlanOptions,
)
def plan(
    given: ScenarioOptions,
    what: PlannedOptions,
    library: LibraryOptions,
    compiler: CompilerOptions,
    options: PlanOptions,
) -> None:
    """Plan every kernel that any number of tokens can need, without a GPU.

    Options that describe the run of a warm-up need --policy.
    """
    check_outputs(timeline=None, trace=None, plot=None, others=(options.json,))
    environ, profile = Environ.read(os.environ), load_profile(options.hardware)
    _check(options, given)
    if what.calls is not None:
        library = library_of(read_recording(what.calls), library)
    with progress("ask the library") as shown:
        target = target_of(
            library,
            gpu_named(library.gpu or gpu_of(profile), what.most_sms),
            environ,
            compiler=compiler,
            ask=options.check or what.calls is not None,
            progress=counting(shown),
        )
        run = {} if given.given["stream"] else {"stream": ()}
        policy = options.policy or WarmupPolicy.NONE
        result = planned(what, given, environ, target, policy=policy, **run)
    if options.check:
        check_rules(result)
        return
    covered = None
    if options.policy is not None:
        if result.scenario is None:
            raise UserError("--policy needs a model: a single GEMM has no warm-up")
        scenario = with_walk_memory(result.scenario, profile)
        covered = coverage(scenario, record_parts(scenario))
    if str(options.json) != "-":
        print(target.describe(result.plan.table))
        _print(result, profile, covered)
    if options.json is not None:
        write_json(options.json, _plan_json(result, target, covered), indent=1)


def _check(options: PlanOptions, given: ScenarioOptions) -> None:
    """Raise UserError for options that do not go together."""
    if options.check and (options.policy is not None or options.json is not None):
        raise UserError("--check only shows differences: it does not go with --policy or --json")
    of_run = [item.flag for item in given.changed("run", "placement")]
    if of_run and options.policy is None:
        raise UserError(f"{of_run[0]} describes the run of a warm-up: give --policy with it")


def check_rules(result: Planned) -> None:
    """Print every difference between the plan's table, from the library, and our rules.

    Raises:
        WorkFailedError: there are differences.
    """
    table = result.plan.table
    if table.origin.library != RULES.origin.library or table.origin.arch != RULES_ARCH:
        raise UserError(
            f"--check needs {RULES.origin.library} on {RULES_ARCH}, but this is "
            f"{table.origin.library} on {table.origin.arch}: there are no rules for it"
        )
    rules = RULES.on(table.origin.gpu, table.origin.num_sms, table.recipe)
    lines = differences(result.plan.demands, rules, table)
    for line in lines:
        print(line)
    if lines:
        raise WorkFailedError(f"{len(lines)} differences between our rules and the library")
    calls = sum(len(demand.ms) for demand in result.plan.demands)
    print(
        f"{table.origin.describe()}\n{result.title}\n"
        f"no difference: {len(result.plan.kernels)} kernels in {calls} calls, and each M runs the "
        "same kernel in our rules and in the library"
    )


def costs_of(profile: Profile) -> ProfileCosts:
    """Cost of compiles on a profile's node; the choice of link does not matter to it."""
    return ProfileCosts(profile, next(iter(profile.links.values())), profile.cores_per_node)


def _print(result: Planned, profile: Profile, covered: Coverage | None) -> None:
    costs = costs_of(profile)
    pp = 1 if result.scenario is None else result.scenario.parallel.pp
    kernels = [item.kernel for item in result.plan.kernels]
    steps = costs.build_spans(kernels, profile.cores_per_node)
    machine = Machine(
        name=profile.name,
        cores=profile.cores_per_node,
        seconds_of=costs.compile_seconds,
        build_seconds=max((end for _, _, end in steps), default=0.0),
    )
    print(result.title)
    print_plan(result.plan, machine, pp=pp)
    if covered is not None:
        print_coverage(covered, result.plan)
        print_stalls(covered.stalls)


def _plan_json(result: Planned, target: Target, covered: Coverage | None) -> dict[str, object]:
    """The plan with its cache keys, unless something that they depend on is unknown."""
    if target.lacking:
        click.echo(f"cache keys are left out: {target.lacking}", err=True)
    keys = None if target.lacking else target.keys(result.plan.table)
    policy = None if covered is None else _policy_json(covered)
    return {**plan_to_json(result.plan, keys), "for": result.title, "policy": policy}


def _policy_json(covered: Coverage) -> dict[str, object]:
    return {
        "name": covered.policy.value,
        "compiled": len(covered.compiled),
        "missing": covered.missing,
        "superfluous": covered.superfluous,
        "uncovered": [use_to_json(use) for use in covered.uncovered],
        "stalls": [
            [stall.forward, stall.name, stall.node, stall.kernel] for stall in covered.stalls
        ],
    }
