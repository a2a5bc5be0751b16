"""The Python API: plan, compile, verify, simulate, and read Timelines.

It takes and returns the values that the commands work with; docs/api.md shows them at work. Nothing
here needs torch. An ``environ`` that is not given is read from the process's variables.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runner.build.compiler import NvccCompiler
from runner.build.prebuild import BuildReport, BuildRequest, prebuild
from runner.cache.kernel_cache import KernelCache
from runner.cache.machine import TargetMachine
from runner.cache.manifest import Manifest, read_manifest
from runner.cache.plan_file import PlanFile, read_plan_file
from runner.cache.verify import Expectation, Finding
from runner.cache.verify import verify as verify_entries
from runner.config.environ import Environ, available_cores
from runner.config.hf import load_model
from runner.config.parallel import ParallelConfig
from runner.config.warmup import WarmupPolicy
from runner.errors import UserError, WorkFailedError
from runner.kernels.nvcc import require_nvcc
from runner.planning.plan import Plan, plan_of
from runner.scenario import Scenario
from runner.standin.gpus import DEFAULT_GPU, gpu_named
from runner.target import CompilerOptions, LibraryOptions, Target, cache_machine, target_of
from runner.timeline import Span, Timeline, read_timelines
from sim.costs.profile import load_profile
from sim.machine import MachineOptions, with_walk_memory
from sim.simulate import Prediction
from sim.simulate import simulate as simulate_on

__all__ = [
    "BuildReport",
    "CompilerOptions",
    "LibraryOptions",
    "MachineOptions",
    "ParallelConfig",
    "Plan",
    "Prediction",
    "Scenario",
    "Span",
    "Target",
    "Timeline",
    "UserError",
    "Verification",
    "WarmupPolicy",
    "WorkFailedError",
    "compile",
    "find_target",
    "load_model",
    "plan",
    "read_timelines",
    "simulate",
    "verify",
]

_ANY_LIBRARY, _THIS_MACHINE, _H200 = LibraryOptions(), CompilerOptions(), MachineOptions()


def find_target(
    library: LibraryOptions = _ANY_LIBRARY,
    compiler: CompilerOptions = _THIS_MACHINE,
    environ: Environ | None = None,
) -> Target:
    """Whose kernels, on which GPU, compiled by what; give its ``source`` to a Scenario.

    Raises:
        UserError: options that contradict each other, or a library or GPU that is not known.
    """
    environ = environ or Environ.read(os.environ)
    return target_of(library, gpu_named(library.gpu or DEFAULT_GPU), environ, compiler=compiler)


def plan(scenario: Scenario) -> Plan:
    """Every kernel that any rank can need in a forward of up to ``max_tokens`` tokens.

    Raises:
        UserError: a GEMM that the scenario's source knows nothing of.
    """
    return plan_of(scenario)


def compile(  # noqa: A001  # the command's name
    plan: Plan,
    target: Target,
    cache_dir: Path,
    *,
    jobs: int | None = None,
    environ: Environ | None = None,
    progress: Callable[[int, int, float], None] = lambda done, total, fraction: None,
) -> BuildReport:
    """Build what a cache lacks of a plan; see :func:`runner.build.prebuild.prebuild`.

    Args:
        plan: what is built.
        target: what the plan's scenario took its source from.
        cache_dir: the cache.
        jobs: compiler processes at a time; by default one for each core.
        environ: variables that change the compiler's flags.
        progress: called with (kernels done, of how many, fraction of the work).

    Raises:
        UserError: no nvcc, no library, or a cache that cannot be written or is another machine's.
        WorkFailedError: the disk is full or the like. What does not compile is in the report.
    """
    environ = environ or Environ.read(os.environ)
    cache = KernelCache.of_text(str(cache_dir))
    return prebuild(build_request(plan, target, cache, environ, jobs=jobs), progress=progress)


def build_request(
    plan: Plan,
    target: Target,
    cache: KernelCache,
    environ: Environ,
    *,
    title: str = "",
    jobs: int | None = None,
    fast: bool = True,
) -> BuildRequest:
    """What :func:`compile` builds; see there, and :class:`BuildRequest`.

    Raises:
        UserError: no nvcc, no library, or a cache of the other JIT generation.
    """
    nvcc, table = require_nvcc(environ), plan.table
    if target.library is None:
        raise UserError(
            f"the headers of {table.origin.library} are needed to compile: pip install --no-deps "
            + table.origin.library.replace(" ", "==")
        )
    cache.check_generation(table.recipe.generation)
    return BuildRequest(
        plan=plan,
        title=title,
        keys=target.keys(table),
        compiler=NvccCompiler(nvcc, target.library, table.recipe),
        cache=cache,
        jobs=jobs or available_cores(),
        environment=os.environ,
        fast=fast,
    )


@dataclass(frozen=True)
class Verification:
    """What was found out of a cache.

    Attributes:
        cache: the cache.
        manifest: what it says of itself, if it does.
        built: the manifest, else what the plan was made for; None where neither says.
        machine: on which a server would look it up; None where it is not known.
        findings: every problem of its entries.
        differences: between what it was built for and the machine.
        unknown: why nobody can tell whether a server there would hit it; empty where it was found.
    """

    cache: KernelCache
    manifest: Manifest | None
    built: Manifest | None
    machine: TargetMachine | None
    findings: list[Finding]
    differences: list[str]
    unknown: str

    @property
    def would_hit(self) -> bool:
        """Whether a server on the machine finds everything that should be there."""
        return bool(self.cache.entries()) and not (
            self.findings or self.differences or self.unknown
        )


def verify(
    cache_dir: Path,
    *,
    plan: Path | None = None,
    library: LibraryOptions = _ANY_LIBRARY,
    compiler: CompilerOptions = _THIS_MACHINE,
    environ: Environ | None = None,
) -> Verification:
    """Will a server hit these entries?

    Entries are compared with the cache's manifest and a plan, and what they were built for with
    this machine, or the one that the options describe.

    Args:
        cache_dir: the cache.
        plan: the JSON of ``runner plan``, whose kernels must be there.
        library: of the server; by default the one that the cache was built for.
        compiler: of the server's machine.
        environ: the server's variables.

    Raises:
        UserError: no cache, or a file that cannot be read.
    """
    cache = KernelCache.existing(cache_dir)
    manifest = read_manifest(cache.root)
    plan_file = read_plan_file(plan) if plan else None
    machine, unknown = cache_machine(
        compiler,
        environ or Environ.read(os.environ),
        manifest,
        library=library.library,
        gpu=library.gpu,
    )
    built = manifest or (plan_file.target if plan_file is not None else None)
    if machine is not None and built is None and machine.library.generation == 2:
        unknown = "there is no manifest, and only one says what the keys of this library hold"
    differences = list(machine.differences(built)) if machine is not None and built else []
    expected = _expectation(manifest, plan_file, machine, differ=bool(differences))
    findings = verify_entries(cache, expected)
    return Verification(cache, manifest, built, machine, findings, differences, unknown)


def _expectation(
    manifest: Manifest | None, plan: PlanFile | None, machine: TargetMachine | None, *, differ: bool
) -> Expectation:
    """What entries must be; on a machine that differs, what they were built for is enough."""
    named = list(manifest.entries) if manifest else []
    wanted = plan.keys if plan else named
    built = manifest or (plan.target if plan is not None else None)
    keys = None
    if machine is not None and built is not None and differ:
        same_library = built.library == machine.library.title
        keys = built.keys(machine.library) if same_library else None
    elif machine is not None and (built is not None or machine.library.generation == 1):
        keys = machine.keys(built)
    return Expectation(
        wanted=wanted,
        known={*wanted, *named} if manifest or plan else None,
        keys=keys,
        library=None if machine is None or differ else machine.library,
        manifest=manifest,
    )


def simulate(scenario: Scenario, machine: MachineOptions = _H200) -> Prediction:
    """Predict a start-up, as ``runner sim`` does.

    Raises:
        UserError: a profile or link that is not known, or nodes that do not fit the hosts.
    """
    profile = load_profile(machine.hardware)
    return simulate_on(with_walk_memory(scenario, profile), machine.machine(profile))
