"""``runner compile``: build a deployment's kernels ahead of time, without a GPU."""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from runner.build.compiler import NvccCompiler, find_nvcc
from runner.build.cubin import kernels_in
from runner.build.prebuild import BuildOrder, BuildReport, BuildStoppedError, prebuild
from runner.cache.kernel_cache import KernelCache
from runner.cli.deployment import deployment_options, planned
from runner.cli.target import kernel_options, machine_options, take_target
from runner.config.environ import Environ, available_cores
from runner.errors import UserError, WorkFailedError
from runner.report.progress import counting, progress

_SHOWN_FAILURES = 5
_SHOWN_WORDS = 400


@click.command()
@deployment_options
@kernel_options
@machine_options
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the kernels go.  [default: SGLANG_DG_CACHE_DIR, DG_JIT_CACHE_DIR, else "
    "~/.deep_gemm]",
)
@click.option("--jobs", type=int, help="Compiler processes at a time.  [default: one a core]")
@click.option(
    "--plain", is_flag=True, help="One nvcc process a kernel, as the library compiles: slower."
)
@click.option(
    "--check", is_flag=True, help="Then build all the plain way too, and compare machine code."
)
def compile(  # noqa: A001  # the command's name
    cache_dir: Path | None,
    jobs: int | None,
    plain: bool,
    check: bool,
    **values: Any,
) -> None:
    """Build every planned kernel exactly once, in parallel; a rerun goes on where one stopped."""
    environ = Environ.read(os.environ)
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs} must be at least 1")
    if environ.use_nvrtc or environ.dg_jit_use_nvrtc:
        warnings.warn("NVRTC is not supported: kernels are compiled with nvcc", stacklevel=2)
    nvcc = find_nvcc(environ)
    if nvcc is None:
        raise UserError("there is no nvcc: pip install 'deepgemm-coldstart[nvcc]'")
    with progress("ask the library") as shown:
        target = take_target(values, environ, progress=counting(shown))
        result = planned(values, environ, target)
    table = result.plan.table
    if target.library is None:
        raise UserError(
            f"the headers of {table.origin.library} are needed to compile: pip install --no-deps "
            + table.origin.library.replace(" ", "==")
        )
    keys = target.keys(table)
    cache = KernelCache.of_text(str(cache_dir or environ.jit_cache_dirs))
    cache.check_generation(table.recipe.generation)
    order = BuildOrder(
        plan=result.plan,
        title=result.title,
        keys=keys,
        compiler=NvccCompiler(nvcc, target.library, table.recipe),
        cache=cache,
        jobs=jobs or available_cores(),
        environment=os.environ,
        fast=not plain,
    )
    print(target.describe(result.plan.table))
    print(f"{result.title}\n{len(result.plan.kernels)} kernels -> {cache.root}", flush=True)
    _print(_build(order, "compile"))
    if check:
        _check(order)


def _build(order: BuildOrder, what: str) -> BuildReport:
    try:
        with progress(what) as shown:
            return prebuild(order, say=_say, progress=shown)
    except BuildStoppedError as error:
        raise WorkFailedError(str(error)) from None


def _check(order: BuildOrder) -> None:
    """Hold every kernel's machine code against what one nvcc process makes of it."""
    with tempfile.TemporaryDirectory(prefix="deepgemm-check-") as folder:
        plain = replace(order, cache=KernelCache(Path(folder)), fast=False)
        print("the plain way, to compare:", flush=True)
        _print(_build(plain, "check"))
        keys = [order.keys.cache_key(item.kernel) for item in order.plan.kernels]
        other = [key for key in keys if _code(order.cache, key) != _code(plain.cache, key)]
    for key in other[:_SHOWN_FAILURES]:
        print(f"other machine code: {key}")
    if other:
        raise WorkFailedError(f"{len(other)} of {len(keys)} kernels have other machine code")
    print(f"all {len(keys)} kernels have the same machine code")


def _code(cache: KernelCache, key: str) -> dict[str, bytes]:
    return kernels_in((cache.entry(key) / "kernel.cubin").read_bytes())


def _say(line: str) -> None:
    click.echo(line, err=True)


def _print(report: BuildReport) -> None:
    plain = sum(report.plain.values())
    replaced = f", {report.replaced} of them in place of broken ones" if report.replaced else ""
    print(
        f"{report.built} built{replaced}, {report.present} were there; "
        f"{report.wall_seconds:.1f} s, {report.cpu_seconds:.1f} CPU-seconds"
    )
    if plain and set(report.plain) != {"as asked"}:
        for reason, count in report.plain.most_common(_SHOWN_FAILURES):
            print(f"{count} built the plain way: {reason[:_SHOWN_WORDS]}")
    for name, words in report.failed[:_SHOWN_FAILURES]:
        print(f"failed: {name}: {words[:_SHOWN_WORDS]}")
    if report.failed:
        raise WorkFailedError(f"{len(report.failed)} of {report.planned} kernels do not compile")
