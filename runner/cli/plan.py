"""``runner plan``: the exact kernels that a deployment can ever need."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from runner.cli.common import GIBIBYTES, IntList, check_sizes
from runner.cli.deployment import Planned, deployment_options, planned
from runner.cli.simulated import walk_memory_of
from runner.cli.target import kernel_options, machine_options, take_target
from runner.config.environ import Environ
from runner.driver.warmup import WarmupPolicy
from runner.errors import UserError, WorkFailedError
from runner.files import write_json
from runner.kernels.rules import RULES, RULES_ARCH
from runner.planning.coverage import Coverage, coverage
from runner.planning.demands import Deployment
from runner.planning.library_check import differences
from runner.planning.plan_json import plan_to_json, use_to_json
from runner.report.outputs import check_outputs
from runner.report.plan_table import Machine, print_coverage, print_plan, print_stalls
from runner.report.progress import counting, progress
from sim.costs.profile import Profile, load_profile
from sim.costs.profile_costs import ProfileCosts


@click.command()
@deployment_options
@kernel_options
@machine_options
@click.option(
    "--policy",
    type=click.Choice([policy.value for policy in WarmupPolicy]),
    help="Tell what this warm-up leaves uncovered.",
)
@click.option(
    "--nodes",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --policy: nodes, each with a cache of its own.  [default: one a stage]",
)
@click.option(
    "--stream",
    type=IntList(),
    help="With --policy: tell what requests of these token counts would compile.",
)
@click.option(
    "--walk-max-m",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --policy: end the lists of M that full, fast and relax walk there.",
)
@click.option(
    "--walk-memory",
    type=GIBIBYTES,
    metavar="GIB",
    help="With --policy: GPU memory that a walk of full or fast may take.  [default: what a "
    "server leaves free on --hardware]",
)
@click.option(
    "--cuda-graphs",
    type=IntList(),
    help="With --policy: batch sizes that a CUDA graph of DECODE is captured for.",
)
@click.option(
    "--hardware",
    default="h200",
    show_default=True,
    help="Profile to estimate compiles and free memory with.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Hold our rules against the library itself, M by M, and print every difference.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    help="Write the plan as JSON (- for stdout, and nothing else).",
)
def plan(
    policy: str | None,
    nodes: int | None,
    stream: tuple[int, ...] | None,
    walk_max_m: int | None,
    walk_memory: float | None,
    cuda_graphs: tuple[int, ...] | None,
    check: bool,
    json_path: Path | None,
    **values: Any,
) -> None:
    """Plan exactly: every kernel that any number of tokens can need, without a GPU."""
    check_outputs(timeline=None, trace=None, plot=None, others=(json_path,))
    environ = Environ.read(os.environ)
    profile = load_profile(values["hardware"])
    if check and (policy is not None or json_path is not None):
        raise UserError("--check only tells differences: it does not go with --policy or --json")
    with progress("ask the library") as shown:
        target = take_target(values, environ, ask=check, progress=counting(shown))
        result = planned(values, environ, target)
    if check:
        check_rules(result)
        return
    covered = None
    if policy is not None:
        check_sizes(stream=stream, cuda_graphs=cuda_graphs)
        covered = coverage(
            WarmupPolicy(policy),
            _needs_model(result),
            result.plan,
            nodes=nodes,
            stream=stream or (),
            walk_max_m=walk_max_m,
            walk_memory=walk_memory_of(profile, walk_memory),
            graph_batch_sizes=cuda_graphs or (),
            source=target.source,
        )
    elif any(value is not None for value in (nodes, stream, walk_max_m, walk_memory, cuda_graphs)):
        raise UserError(
            "--nodes, --stream, --walk-max-m, --walk-memory and --cuda-graphs tell about a "
            "warm-up: give --policy"
        )
    if str(json_path) != "-":
        print(target.describe(result.plan.table))
        _print(result, profile, covered)
    if json_path is not None:
        if target.lacking:
            click.echo(f"cache keys are left out: {target.lacking}", err=True)
        keys = None if target.lacking else target.keys(result.plan.table)
        data = plan_to_json(result.plan, keys)
        data["for"] = result.title
        data["policy"] = None if covered is None else _policy_json(covered)
        write_json(json_path, data, indent=1)


def check_rules(result: Planned) -> None:
    """Print every difference between the plan's table, which is the library's, and our rules.

    Raises:
        WorkFailedError: there are some.
    """
    table = result.plan.table
    if table.origin.library != RULES.origin.library or table.origin.arch != RULES_ARCH:
        raise UserError(
            f"--check holds our rules against {RULES.origin.library} on {RULES_ARCH}, and this is "
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
        f"no difference: {len(result.plan.kernels)} kernels in {calls} calls, each kernel and "
        "each M that runs it is the library's"
    )


def _needs_model(result: Planned) -> Deployment:
    if result.deployment is None:
        raise UserError("--policy needs a model: a single GEMM has no warm-up")
    return result.deployment


def costs_of(profile: Profile) -> ProfileCosts:
    """What compiles cost on a node of a profile; which link is all the same to them."""
    return ProfileCosts(profile, next(iter(profile.links.values())), profile.cores_per_node)


def _print(result: Planned, profile: Profile, covered: Coverage | None) -> None:
    costs = costs_of(profile)
    pp = 1 if result.deployment is None else result.deployment.parallel.pp
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


def _policy_json(covered: Coverage) -> dict[str, Any]:
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
