"""The Python API: plan, compile, verify, simulate, and read Timelines.

It takes and returns the same values as the commands; docs/api.md has examples. Nothing here needs
torch. Without an ``environ``, the process's environment variables are read.
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
    """Find the library, GPU and compiler to plan for; pass the result's ``source`` to a Scenario.

    Raises:
        UserError: options that contradict each other, or an unknown library or GPU.
    """
    environ = environ or Environ.read(os.environ)
    return target_of(library, gpu_named(library.gpu or DEFAULT_GPU), environ, compiler=compiler)


def plan(scenario: Scenario) -> Plan:
    """List every kernel that any rank can need in a forward of up to ``max_tokens`` tokens.

    Raises:
        UserError: the scenario's source does not know one of its GEMMs, or is for a GPU with
            another number of SMs.
    """
    gpu = scenario.source.origin
    if scenario.num_sms != gpu.num_sms:
        raise UserError(f"num_sms={scenario.num_sms} must be {gpu.num_sms}, as {gpu.gpu} has")
    return plan_of(scenario)


def compile(  # noqa: A001  # the command's name
    plan: Plan,
    target: Target,
    cache_dir: Path | str,
    *,
    jobs: int | None = None,
    environ: Environ | None = None,
    title: str = "",
    progress: Callable[[int, int, float], None] = lambda done, total, fraction: None,
) -> BuildReport:
    """Build the planned kernels that a cache lacks; see :func:`runner.build.prebuild.prebuild`.

    Args:
        plan: the kernels to build.
        target: the target that the plan's scenario got its source from.
        cache_dir: the cache to build into.
        jobs: compiler processes that run at a time; by default one per core.
        environ: variables that say where nvcc is.
        title: what the kernels are for; it goes into the cache's manifest.
        progress: called with (kernels done, kernels in total, fraction of the work done).

    Raises:
        UserError: no nvcc, no library, or a cache that is not writable or for another machine.
        WorkFailedError: the build stopped, say on a full disk. Failed kernels are in the report.
    """
    environ = environ or Environ.read(os.environ)
    cache = KernelCache.of_text(str(cache_dir))
    request = build_request(plan, target, cache, environ, title=title, jobs=jobs)
    return prebuild(request, progress=progress)


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
    """Make the request that :func:`compile` carries out, from the same arguments.

    Raises:
        UserError: no nvcc, no library, a cache directory that this JIT generation cannot read, or
            jobs below 1.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs={jobs} must be at least 1")
    nvcc, table = require_nvcc(environ), plan.table
    if target.library is None:
        raise UserError(
            f"the headers of {table.origin.library} are needed to compile: pip install --no-deps "
            + table.origin.library.replace(" ", "==")
        )
    cache.check_generation(table.recipe.generation)
    return BuildRequest(
        plan=plan,
        title=title or f"{len(plan.demands)} GEMM shapes",
        keys=target.keys(table),
        compiler=NvccCompiler(nvcc, target.library, table.recipe),
        cache=cache,
        jobs=jobs or available_cores(),
        environment=os.environ,
        fast=fast,
    )


@dataclass(frozen=True)
class Verification:
    """The result of checking a cache.

    Attributes:
        cache: the cache.
        manifest: the cache's manifest, if it has one.
        built: what the cache was built for, from the manifest or else the plan; None if unknown.
        machine: the machine where a server will use the cache; None if unknown.
        findings: every problem with the entries.
        differences: how ``machine`` differs from what the cache was built for.
        unknown: why hits cannot be predicted; empty if they can.
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
        """Whether a server on the machine would find every expected kernel."""
        return bool(self.cache.entries()) and not (
            self.findings or self.differences or self.unknown
        )


def verify(
    cache_dir: Path | str,
    *,
    plan: Path | str | None = None,
    library: LibraryOptions = _ANY_LIBRARY,
    compiler: CompilerOptions = _THIS_MACHINE,
    environ: Environ | None = None,
) -> Verification:
    """Check whether a server will hit these entries.

    Entries are compared with the cache's manifest and a plan. The machine they were built for is
    compared with this machine, or with the one that the options describe.

    Args:
        cache_dir: the cache to check.
        plan: JSON from ``runner plan``; the cache must hold all its kernels.
        library: the server's library; by default the one that the cache was built for.
        compiler: the compiler of the server's machine.
        environ: the server's environment variables.

    Raises:
        UserError: there is no cache, or a file cannot be read.
    """
    cache = KernelCache.existing(Path(cache_dir))
    manifest = read_manifest(cache.root)
    plan_file = read_plan_file(Path(plan)) if plan else None
    machine, unknown = cache_machine(
        compiler,
        environ or Environ.read(os.environ),
        manifest,
        library=library.library,
        gpu=library.gpu,
    )
    built = manifest or (plan_file.target if plan_file is not None else None)
    if machine is not None and built is None and machine.library.generation == 2:
        unknown = "there is no manifest, and this library's keys cannot be computed without one"
    differences = list(machine.differences(built)) if machine is not None and built else []
    expected = _expectation(manifest, plan_file, machine, differ=bool(differences))
    findings = verify_entries(cache, expected)
    return Verification(cache, manifest, built, machine, findings, differences, unknown)


def _expectation(
    manifest: Manifest | None, plan: PlanFile | None, machine: TargetMachine | None, *, differ: bool
) -> Expectation:
    """What to expect of the entries: on a different machine, only what they were built for."""
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
        UserError: an unknown profile or link, or nodes that do not fit the hosts.
    """
    profile = load_profile(machine.hardware)
    return simulate_on(with_walk_memory(scenario, profile), machine.machine(profile))
