"""``runner plan``: the exact kernels that a deployment can ever need."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from runner.cli.ask_library import ask_library
from runner.cli.common import GIBIBYTES, IntList, check_sizes
from runner.cli.deployment import (
    Planned,
    deployment_options,
    find_target,
    planned,
    target_options,
)
from runner.cli.simulated import walk_memory_of
from runner.coverage import Coverage, coverage
from runner.deployment import Deployment
from runner.environ import Environ
from runner.errors import UserError
from runner.files import write_json
from runner.jit.plan_json import plan_to_json, use_to_json
from runner.report.outputs import check_outputs
from runner.report.plan_table import Machine, print_coverage, print_plan, print_stalls
from runner.warmup import WarmupPolicy
from sim.profile import Profile, load_profile
from sim.profile_costs import ProfileCosts


@click.command()
@deployment_options
@target_options
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
    "--source",
    type=click.Choice(["rules", "library"]),
    default="rules",
    show_default=True,
    help="Plan by our rules, or ask the installed library itself (needs a GPU).",
)
@click.option("--check", is_flag=True, help="Do both and print every difference (needs a GPU).")
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="With --source library: ask only for what this cache lacks.",
)
@click.option(
    "--jobs", type=int, default=8, show_default=True, help="Walks of the library at a time."
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    help="Write the plan as JSON (- for stdout, and nothing else).",
)
def plan(policy: str | None, nodes: int | None, stream: tuple[int, ...] | None,
         walk_max_m: int | None, walk_memory: float | None, cuda_graphs: tuple[int, ...] | None,
         hardware: str, source: str, check: bool, cache_dir: Path | None, jobs: int,
         json_path: Path | None, target_root: Path | None, cuda_version: str | None,
         **values: Any) -> None:  # fmt: skip
    """Plan exactly: every kernel that any number of tokens can need, without a GPU."""
    check_outputs(timeline=None, trace=None, plot=None, others=(json_path,))
    if cache_dir is not None and source != "library":
        raise UserError(f"--cache-dir {cache_dir} goes with --source library only")
    if cache_dir is not None and check:
        raise UserError("--check compares whole plans: it does not go with --cache-dir")
    environ = Environ.read(os.environ)
    profile = load_profile(hardware)
    result = planned(values, environ)
    if source == "library" or check:
        if policy is not None or target_root is not None or cuda_version is not None:
            raise UserError(
                "--policy, --target-root and --cuda-version do not go with --source library or "
                "--check: the library here answers for itself"
            )
        ask_library(result, check=check, cache_dir=cache_dir, jobs=jobs, json_path=json_path)
        return
    target = (
        find_target(target_root, cuda_version) if json_path or target_root or cuda_version else None
    )
    covered = None
    if policy is not None:
        check_sizes(stream=stream, cuda_graphs=cuda_graphs)
        covered = coverage(
            WarmupPolicy(policy), _needs_model(result), result.plan, nodes=nodes,
            stream=stream or (), walk_max_m=walk_max_m,
            walk_memory=walk_memory_of(profile, walk_memory),
            graph_batch_sizes=cuda_graphs or (),
        )  # fmt: skip
    elif any(value is not None for value in (nodes, stream, walk_max_m, walk_memory, cuda_graphs)):
        raise UserError(
            "--nodes, --stream, --walk-max-m, --walk-memory and --cuda-graphs tell about a "
            "warm-up: give --policy"
        )
    if str(json_path) != "-":
        _print(result, profile, covered)
    if json_path is not None and target is not None:
        if target.keys is None:
            click.echo(f"cache keys are left out: {target.lacking}", err=True)
        data = plan_to_json(result.plan, target.keys)
        data["for"] = result.title
        data["policy"] = None if covered is None else _policy_json(covered)
        write_json(json_path, data, indent=1)


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
