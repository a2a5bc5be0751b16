"""``runner cache verify`` and ``relocate``: a cache and the machine that will use it."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import click

from runner.api import Verification
from runner.api import verify as verify_cache
from runner.cache.kernel_cache import KernelCache
from runner.cache.lock import locked, say_waiting
from runner.cache.machine import TargetMachine, compiler_words
from runner.cache.machine import relocate as relocate_cache
from runner.cache.manifest import (
    Manifest,
    check_target,
    describe_entry,
    merge_manifest,
    read_manifest,
)
from runner.cache.verify import Finding
from runner.cli.calls import write_plan_of_calls
from runner.config.environ import Environ, available_cores
from runner.config.fields import OptionDetails, option
from runner.errors import UserError, WorkFailedError
from runner.kernels.entry import format_of, kernel_name
from runner.options import PathType, with_options
from runner.report.progress import counting, progress
from runner.target import CompilerOptions, LibraryOptions, cache_machine, check_release

_SHOWN = 20
_NAMED = 3

directory_type = PathType(file_okay=False)
plan_option = click.option(
    "--plan",
    "plan_path",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="JSON from runner plan.",
)


_LIBRARY = OptionDetails(
    "The server's library.  [default: the one that the cache was built for]", metavar="NAME|PATH"
)


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What to compare a cache with."""

    plan: Path | None = option(None, OptionDetails("JSON from runner plan."))
    calls: Path | None = option(
        None,
        OptionDetails("A recording of runner record or rehearse, whose calls are planned first."),
    )
    library: str | None = option(None, _LIBRARY)
    gpu: str | None = option(
        None,
        OptionDetails(
            "The server's GPU.  [default: the one here, if there is one]", metavar="NAME"
        ),
    )
    call: bool = option(
        False,
        OptionDetails(
            "Also call the library with every M in the manifest, on the GPU here or on a "
            "stand-in: it must compile nothing."
        ),
    )
    jobs: int | None = option(None, OptionDetails("Walks that --call runs at a time.", least=1))


@click.command()
@click.argument("directory", type=directory_type)
@with_options(VerifyOptions, CompilerOptions)
def verify(options: VerifyOptions, compiler: CompilerOptions, directory: Path) -> None:
    """Check whether a server here will hit these entries; exit with 0 if so, else show why not.

    Entries are compared with the manifest and a plan. The machine they were built for is compared
    with this machine, or with the one that the options describe.
    """
    if options.plan is not None and options.calls is not None:
        raise UserError("--plan and --calls both say what the cache must hold: give one")
    library = LibraryOptions(library=options.library, gpu=options.gpu)
    with tempfile.TemporaryDirectory(prefix="deepgemm-verify-") as folder:
        plan = options.plan
        if options.calls is not None:
            plan = write_plan_of_calls(options.calls, Path(folder), library, compiler)
        result = verify_cache(directory, plan=plan, library=library, compiler=compiler)
    for line in result.differences:
        print(line)
    _print_findings(result.findings)
    if result.differences or result.findings:
        kinds = Counter(finding.problem for finding in result.findings)
        words = [f"{count} {kind}" for kind, count in kinds.items()]
        words += ["a server here would compile all of it again"] if result.differences else []
        raise WorkFailedError(f"{directory}: {', '.join(words)}")
    built, machine, entries = result.built, result.machine, len(result.cache.entries())
    if built is None and not entries:
        raise WorkFailedError(f"{directory} holds no entries")
    checked = {
        f"{entries} entries": True,
        "manifest": result.manifest is not None,
        "plan": options.plan is not None,
        "recorded calls": options.calls is not None,
        "this machine": machine is not None,
        "GPU": machine is not None and machine.device is not None,
    }
    where = f" for {built.gpu} ({built.num_sms} SMs)" if built is not None and built.gpu else ""
    names = ", ".join(name for name, was_checked in checked.items() if was_checked)
    print(f"{directory} is whole{where}: checked {names}")
    if options.call:
        _call(result, options.jobs or available_cores())
    if result.unknown:
        raise WorkFailedError(
            f"cannot tell whether a server here would hit this cache: {result.unknown}"
        )


def _print_findings(findings: list[Finding]) -> None:
    for finding in findings[:_SHOWN]:
        print(f"{finding.problem}: {finding.key} {finding.words}")
    if len(findings) > _SHOWN:
        print(f"... and {len(findings) - _SHOWN} more")


def _call(verified: Verification, jobs: int) -> None:
    """Check with the library itself that it compiles none of the manifest's kernels again."""
    from runner.cache.call_check import call_on_cache

    found, manifest, machine = verified.cache, verified.manifest, verified.machine
    if manifest is None or machine is None:
        raise UserError("--call needs a manifest, the library and nvcc here")
    with progress("call the library") as shown:
        report = call_on_cache(found, manifest, machine, jobs=jobs, progress=counting(shown))
    print(
        f"{report.calls} calls of {machine.library.title} on {report.where}: "
        f"{len(report.compiled)} compiles asked for, {len(report.added)} new entries"
    )
    if report.compiled or report.added:
        names = ", ".join(sorted(set(report.added or report.compiled))[:_NAMED])
        raise WorkFailedError(f"{found.root} lacks kernels that the library asks for: {names}")


@dataclass(frozen=True, kw_only=True)
class RelocateOptions:
    """Where to put the cache, and what a cache without a manifest was built for."""

    to: Path = option(
        Path(), OptionDetails("Where to put the new entries.", metavar="DIRECTORY", required=True)
    )
    library: str | None = option(None, _LIBRARY)
    from_root: Path | None = option(
        None,
        OptionDetails(
            "Without a manifest: the deep_gemm folder that the cache was built for.",
            metavar="PATH",
        ),
    )
    from_cuda: str | None = option(
        None,
        OptionDetails("Without a manifest: the CUDA release that built it.", metavar="X.Y"),
    )


@click.command()
@click.argument("directory", type=directory_type)
@with_options(RelocateOptions, CompilerOptions)
def relocate(options: RelocateOptions, compiler: CompilerOptions, directory: Path) -> None:
    """Copy a cache so that a server with another install path or compiler hits it."""
    source = KernelCache.existing(directory)
    manifest = read_manifest(source.root)
    if compiler.target_root is None and (manifest is None or manifest.generation == 1):
        raise UserError("give --target-root PATH: where deep_gemm is on that machine")
    machine, unknown = cache_machine(
        compiler, Environ.read(os.environ), manifest, library=options.library
    )
    if machine is None:
        raise UserError(unknown)
    if manifest is None and machine.library.generation == 2:
        raise UserError(f"{directory} has no manifest, and its keys cannot be computed without one")
    manifest = manifest or _manifest_of(source, machine, options.from_root, options.from_cuda)
    _check_same_build(directory, manifest, machine)
    keys = machine.keys(manifest)
    target = KernelCache.writable(options.to)
    to = target.root
    if to.resolve() in [root.resolve() for root in (source.root, *source.below)]:
        raise UserError(f"--to {to} must be another directory: a cache is for one machine")
    target.prepare()
    with locked(to, on_wait=say_waiting), progress("relocate") as shown:
        check_target(to, replace(manifest, signature=keys.signature, flags=keys.flags))
        moved, placed, refused = relocate_cache(
            source, manifest, keys, machine.library, target, progress=counting(shown)
        )
        merge_manifest(to, moved)
    _print_findings(refused)
    print(
        f"{placed} kernels placed in {target.root} for {machine.root} and "
        f"{compiler_words(keys.signature)}, {len(moved.entries) - placed} already there"
    )
    if refused:
        raise WorkFailedError(f"{len(refused)} entries could not be relocated")


def _check_same_build(directory: Path, manifest: Manifest, machine: TargetMachine) -> None:
    """Raise UserError if the machine's library or flags make other kernels than the cache's."""
    if manifest.library != machine.library.title:
        raise UserError(
            f"{directory} was built for {manifest.library}, but the library here is "
            f"{machine.library.title}: install that one, or give it with --library"
        )
    if changed := machine.changed_flags(manifest):
        raise UserError(
            f"{directory} was built with other flags than the DG_JIT_* variables here ask for "
            f"({', '.join(changed)}): unset them, or build the cache again"
        )


def _manifest_of(
    source: KernelCache, machine: TargetMachine, from_root: Path | None, from_cuda: str | None
) -> Manifest:
    """Make a manifest for a cache that the library filled, from the user's options."""
    if from_root is None or from_cuda is None:
        raise UserError(
            f"{source.root} has no manifest: say what it was built for with --from-root PATH and "
            "--from-cuda X.Y"
        )
    text = "NVCC{}.{}".format(*check_release(from_cuda))
    keys = replace(machine, root=from_root, version_text=text).keys(None)
    entries = {
        path.name: describe_entry(path, kernel_name(path.name), [])
        for path in source.entries()
        if path.is_dir() and format_of(path.name) and source.has(path.name)
    }
    return Manifest.of_keys(keys, machine.library.title, entries=entries)
