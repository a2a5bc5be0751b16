"""``runner cache verify`` and ``relocate``: a cache and the machine that will look it up."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from runner.build.compiler import find_nvcc, keys_for
from runner.cache.entry import format_of, kernel_name
from runner.cache.kernel_cache import KernelCache
from runner.cache.keys import CacheKeys, first_recipe
from runner.cache.machine import Machine, compiler_words
from runner.cache.manifest import (
    Entry,
    Manifest,
    check_target,
    describe_entry,
    locked,
    merge_manifest,
    read_manifest,
)
from runner.cache.plan_file import PlanFile, read_plan_file
from runner.cache.relocate import relocate as relocate_cache
from runner.cache.verify import Expectation, Finding
from runner.cache.verify import verify as verify_cache
from runner.cli.target import check_release, machine_options, take_machine
from runner.config.environ import Environ, available_cores
from runner.errors import UserError, WorkFailedError
from runner.report.progress import counting, progress
from runner.standin.gpus import gpu_named

_SHOWN = 20
_NAMED = 3

directory_type = click.Path(path_type=Path, file_okay=False)
plan_option = click.option(
    "--plan",
    "plan_path",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="JSON of runner plan.",
)

_library_option = click.option(
    "--library",
    "library_name",
    metavar="NAME|PATH",
    help="The server's library.  [default: the one that the cache was built for]",
)


@click.command()
@click.argument("directory", type=directory_type)
@plan_option
@machine_options
@_library_option
@click.option(
    "--gpu", metavar="NAME", help="The server's GPU.  [default: the one here, if there is one]"
)
@click.option(
    "--call",
    is_flag=True,
    help="Also call the library with every M that the manifest names, on the GPU here or on a "
    "stand-in: it must compile nothing.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Walks of --call at a time.")
def verify(
    directory: Path, plan_path: Path | None, call: bool, jobs: int | None, **values: Any
) -> None:
    """Will a server here hit these entries? Exit code 0 only if so; else say what differs.

    Entries are held against the manifest and a plan, and what they were built for against this
    machine, or the one that the options describe.
    """
    found = existing(directory)
    manifest = read_manifest(found.root)
    plan = read_plan_file(plan_path) if plan_path else None
    machine, unknown = take_machine(values, Environ.read(os.environ), manifest)
    built = manifest or (plan.target if plan is not None else None)
    if machine is not None and built is None and machine.library.generation == 2:
        unknown = "there is no manifest, and only one says what the keys of this library hold"
    differing = list(machine.differences(built)) if machine is not None and built else []
    expected = _expectation(manifest, plan, machine, other=bool(differing))
    findings = verify_cache(found, expected)
    for line in differing:
        print(line)
    _show(findings)
    if differing or findings:
        kinds = Counter(finding.problem.value for finding in findings)
        words = [f"{count} {kind}" for kind, count in kinds.items()]
        words += ["a server here would compile all of it again"] if differing else []
        raise WorkFailedError(f"{directory}: {', '.join(words)}")
    checked = [f"{found.count()} entries"]
    checked += ["manifest"] * (manifest is not None) + ["plan"] * (plan is not None)
    checked += ["this machine"] * (machine is not None)
    checked += ["GPU"] * (machine is not None and machine.device is not None)
    if built is None and not found.count():
        raise WorkFailedError(f"{directory} holds no entries")
    where = f" for {built.gpu} ({built.num_sms} SMs)" if built is not None and built.gpu else ""
    print(f"{directory} is whole{where}: checked {', '.join(checked)}")
    if call:
        _call(found, manifest, machine, jobs)
    if unknown:
        raise WorkFailedError(f"whether a server here would hit it cannot be told: {unknown}")


def _call(
    found: KernelCache, manifest: Manifest | None, machine: Machine | None, jobs: int | None
) -> None:
    """Prove by the library itself that nothing of what the manifest names is compiled again."""
    from runner.kernels.prove import Prover, demands_of

    environ = Environ.read(os.environ)
    nvcc = find_nvcc(environ)
    if manifest is None or machine is None or nvcc is None:
        raise UserError("--call needs a manifest, the library and nvcc here")
    real = Path("/dev/nvidiactl").exists()
    gpu = None if real else gpu_named(manifest.gpu, manifest.num_sms)
    prover = Prover(
        machine.library,
        gpu,
        nvcc,
        machine.version_text,
        os.environ,
        jobs or available_cores(),
    )
    with progress("call the library") as shown:
        proof = prover.prove(found, demands_of(manifest), counting(shown))
    where = "the GPU here" if real else f"a stand-in {manifest.gpu}"
    print(
        f"{proof.calls} calls of {machine.library.title} on {where}: {len(proof.asked)} compiles "
        f"asked for, {len(proof.added)} new entries"
    )
    if proof.asked or proof.added:
        names = ", ".join(sorted(set(proof.added or proof.asked))[:_NAMED])
        raise WorkFailedError(f"{found.root} lacks kernels that the library asks for: {names}")


def _expectation(
    manifest: Manifest | None, plan: PlanFile | None, machine: Machine | None, *, other: bool
) -> Expectation:
    """What entries must be; where they are for another machine, what they are for is enough."""
    wanted = plan.keys if plan else list(manifest.entries if manifest else ())
    known = {*wanted, *(manifest.entries if manifest else ())}
    keys = None
    if machine is not None:
        built = manifest or (plan.target if plan is not None else None)
        if other and built is not None:
            same = built.library == machine.library.title
            keys = built.keys(machine.library) if same else None
        else:
            keys = _keys_there(machine, built)
    return Expectation(
        wanted=wanted,
        known=known if manifest or plan else None,
        keys=keys,
        library=None if machine is None or other else machine.library,
        manifest=manifest,
    )


def _keys_there(machine: Machine, built: Manifest | None) -> CacheKeys | None:
    """Keys as a server's library makes them; None where only the library itself knows its flags."""
    if built is None and machine.library.generation == 2:
        return None
    recipe = first_recipe(machine.environ) if built is None else machine.recipe(built)
    return keys_for(machine.library, recipe, machine.version_text, machine.root)


def _show(findings: list[Finding]) -> None:
    for finding in findings[:_SHOWN]:
        print(f"{finding.problem.value}: {finding.key} {finding.words}")
    if len(findings) > _SHOWN:
        print(f"... and {len(findings) - _SHOWN} more")


@click.command()
@click.argument("directory", type=directory_type)
@machine_options
@_library_option
@click.option("--to", type=directory_type, required=True, help="Where the new entries go.")
@click.option(
    "--from-root",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Without a manifest: the deep_gemm folder that the cache was built for.",
)
@click.option(
    "--from-cuda", metavar="X.Y", help="Without a manifest: the CUDA release that built it."
)
def relocate(
    directory: Path, to: Path, from_root: Path | None, from_cuda: str | None, **values: Any
) -> None:
    """Copy a cache so that it hits at another install path or with another compiler."""
    source = existing(directory)
    manifest = read_manifest(source.root)
    if values["target_root"] is None and (manifest is None or manifest.generation == 1):
        raise UserError("--target-root PATH is needed: where deep_gemm lies on that machine")
    machine, unknown = take_machine(values, Environ.read(os.environ), manifest)
    if machine is None:
        raise UserError(unknown)
    if manifest is None and machine.library.generation == 2:
        raise UserError(f"{directory} has no manifest, and only one says what its keys hold")
    manifest = manifest or _origin(source, machine, from_root, from_cuda)
    if manifest.library != machine.library.title:
        raise UserError(
            f"{directory} was built for {manifest.library}, and the library here is "
            f"{machine.library.title}: install that one, or give it with --library"
        )
    if changed := machine.changed_flags(manifest):
        raise UserError(
            f"{directory} was built with other flags than DG_JIT_* variables ask for here "
            f"({', '.join(changed)}): unset them, or build the cache anew"
        )
    keys = _keys_there(machine, manifest)
    assert keys is not None, "a manifest says what it was built for"
    if to.resolve() == directory.resolve():
        raise UserError(f"--to {to} must be another directory: a cache is for one machine")
    target = KernelCache(to)
    target.prepare()
    with locked(to), progress("relocate") as shown:
        check_target(to, replace(manifest, signature=keys.signature, flags=keys.flags))
        result = relocate_cache(
            source, manifest, keys, machine.library, target, progress=counting(shown)
        )
        merge_manifest(to, result.manifest)
    _show(result.refused)
    print(
        f"{result.placed} kernels placed in {target.root} for {machine.root} and "
        f"{compiler_words(keys.signature)}, {result.present} were there"
    )
    if result.refused:
        raise WorkFailedError(f"{len(result.refused)} entries could not be relocated")


def _origin(
    source: KernelCache, machine: Machine, from_root: Path | None, from_cuda: str | None
) -> Manifest:
    """A manifest made from what the user says of a cache that the library made."""
    if from_root is None or from_cuda is None:
        raise UserError(
            f"{source.root} has no manifest: say what it was built for with --from-root PATH and "
            "--from-cuda X.Y"
        )
    recipe = first_recipe(machine.environ)
    text = "NVCC{}.{}".format(*check_release(from_cuda))
    keys = keys_for(machine.library, recipe, text, from_root)
    entries: dict[str, Entry] = {}
    for path in source.entries():
        if path.is_dir() and format_of(path.name) and source.has(path.name):
            entries[path.name] = describe_entry(path, kernel_name(path.name), [])
    return Manifest(
        library=machine.library.title,
        arch=recipe.arch,
        signature=keys.signature,
        flags=keys.flags,
        built_with=keys.signature,
        entries=entries,
    )


def existing(directory: Path) -> KernelCache:
    """The cache in a directory.

    Raises:
        UserError: there is none.
    """
    found = KernelCache.of_text(str(directory))
    if not (found.root / "cache").is_dir():
        raise UserError(f"{directory} is not a kernel cache: it has no folder named cache")
    return found
