"""``runner compile``: build a deployment's kernels ahead of time, without a GPU."""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import click

from runner.api import build_request
from runner.build.prebuild import BuildRequest, prebuild
from runner.cache.kernel_cache import KernelCache
from runner.cache.lock import say_waiting
from runner.cli.calls import library_of
from runner.cli.deployment import PlannedOptions, planned
from runner.config.environ import Environ
from runner.config.fields import OptionDetails, option
from runner.errors import WorkFailedError
from runner.kernels.entry import CUBIN, kernels_in
from runner.kernels.nvcc import require_nvcc
from runner.options import ScenarioOptions, scenario_options, with_options
from runner.recording.recording import read_recording
from runner.report.progress import counting, progress
from runner.standin.gpus import DEFAULT_GPU, gpu_named
from runner.target import CompilerOptions, LibraryOptions, target_of

_SHOWN_FAILURES = 5
_SHOWN_WORDS = 400


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Where to put kernels, and how to build them."""

    cache_dir: Path | None = option(
        None,
        OptionDetails(
            "Where to put kernels.  [default: SGLANG_DG_CACHE_DIR, DG_JIT_CACHE_DIR, else "
            "~/.deep_gemm]",
            metavar="DIRECTORY",
        ),
    )
    jobs: int | None = option(
        None, OptionDetails("Parallel compiler processes.  [default: one per core]", least=1)
    )
    plain: bool = option(
        False, OptionDetails("One nvcc process per kernel, as the library compiles: slower.")
    )
    check: bool = option(
        False, OptionDetails("Then build everything with --plain too, and compare the code.")
    )


@click.command()
@with_options(
    scenario_options("model", "deployment", "plan", pp=4, tp=2),
    PlannedOptions,
    LibraryOptions,
    CompilerOptions,
    CompileOptions,
)
def compile(  # noqa: A001  # the command's name
    given: ScenarioOptions,
    what: PlannedOptions,
    library: LibraryOptions,
    compiler: CompilerOptions,
    options: CompileOptions,
) -> None:
    """Build every planned kernel exactly once, in parallel; a rerun continues where one stopped."""
    environ = Environ.read(os.environ)
    if environ.use_nvrtc or environ.dg_jit_use_nvrtc:
        warnings.warn("NVRTC is not supported: kernels are compiled with nvcc", stacklevel=2)
    require_nvcc(environ)  # Asking the library takes a while: fail first.
    with progress("ask the library") as shown:
        if what.calls is not None:
            library = library_of(read_recording(what.calls), library)
        target = target_of(
            library,
            gpu_named(library.gpu or DEFAULT_GPU, what.most_sms),
            environ,
            compiler=compiler,
            ask=what.calls is not None,
            progress=counting(shown),
        )
        result = planned(what, given, environ, target)
    cache = KernelCache.of_text(str(options.cache_dir or environ.jit_cache_dirs))
    request = build_request(
        result.plan,
        target,
        cache,
        environ,
        title=result.title,
        jobs=options.jobs,
        fast=not options.plain,
    )
    print(target.describe(result.plan.table))
    print(f"{result.title}\n{len(result.plan.kernels)} kernels -> {cache.root}", flush=True)
    _build(request, "compile")
    if options.check:
        _check(request)


def _build(request: BuildRequest, what: str) -> None:
    """Build, and print a summary."""
    with progress(what) as shown:
        report = prebuild(request, on_wait=say_waiting, progress=shown)
    replaced = f", {report.replaced} of them in place of broken ones" if report.replaced else ""
    print(
        f"{report.built} built{replaced}, {report.present} already there; "
        f"{report.wall_seconds:.1f} s, {report.cpu_seconds:.1f} CPU-seconds"
    )
    if request.fast:
        for reason, count in report.plain.most_common(_SHOWN_FAILURES):
            print(f"{count} built the plain way: {reason[:_SHOWN_WORDS]}")
    for name, words in report.failed[:_SHOWN_FAILURES]:
        print(f"failed: {name}: {words[:_SHOWN_WORDS]}")
    if report.failed:
        raise WorkFailedError(f"{len(report.failed)} of {report.planned} kernels do not compile")


def _check(request: BuildRequest) -> None:
    """Compare every kernel's machine code with that of a separate nvcc process."""
    with tempfile.TemporaryDirectory(prefix="deepgemm-check-") as folder:
        plain = replace(request, cache=KernelCache(Path(folder)), fast=False)
        print("building everything the plain way, to compare:", flush=True)
        _build(plain, "check")
        keys = list(request.by_key())
        differing = [key for key in keys if _code(request.cache, key) != _code(plain.cache, key)]
    for key in differing[:_SHOWN_FAILURES]:
        print(f"other machine code: {key}")
    if differing:
        raise WorkFailedError(f"{len(differing)} of {len(keys)} kernels have other machine code")
    print(f"all {len(keys)} kernels have the same machine code")


def _code(cache: KernelCache, key: str) -> dict[str, bytes]:
    return kernels_in((cache.entry(key) / CUBIN).read_bytes())
