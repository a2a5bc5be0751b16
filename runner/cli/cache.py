"""``runner cache``: list, verify, relocate, pack, unpack and prune kernel caches."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from runner.cli.deployment import find_target, target_options
from runner.cli.guard import WorkFailedError
from runner.cli.progress import counting, progress
from runner.errors import UserError
from runner.files import write_json
from runner.jit.cache import KernelCache
from runner.jit.describe import config_of_source, in_words
from runner.jit.keys import CacheKeys
from runner.jit.library import find_library
from runner.jit.store.archive import pack as pack_cache
from runner.jit.store.archive import unpack as unpack_archive
from runner.jit.store.manifest import (
    Entry,
    Manifest,
    check_target,
    describe_entry,
    locked,
    merge_manifest,
    read_manifest,
)
from runner.jit.store.plan_file import PlanFile, read_plan_file, uses_in_words
from runner.jit.store.prune import prune as prune_entries
from runner.jit.store.prune import size_of, superfluous
from runner.jit.store.relocate import relocate as relocate_cache
from runner.jit.store.verify import Expectation, Finding
from runner.jit.store.verify import verify as verify_cache

_SHOWN = 20

_directory = click.Path(path_type=Path, file_okay=False)
_plan_option = click.option(
    "--plan",
    "plan_path",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="JSON of runner plan.",
)


@click.group()
def cache() -> None:
    """List, verify, move and pack kernel caches (DG_JIT_CACHE_DIR directories)."""


@cache.command()
@click.argument("directory", type=_directory)
@_plan_option
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    help="Write the list as JSON (- for stdout, and nothing else).",
)
def ls(directory: Path, plan_path: Path | None, json_path: Path | None) -> None:
    """List kernels in words: name, configuration, the M that each serves."""
    found = _existing(directory)
    manifest = read_manifest(directory)
    plan = read_plan_file(plan_path) if plan_path else None
    rows = sorted((_row(path, manifest, plan) for path in found.entries()), key=_order)
    if json_path is not None:
        write_json(json_path, {"version": 1, "kernels": rows}, indent=1)
    if str(json_path) == "-":
        return
    for row in rows:
        serves = uses_in_words(row["uses"]) if row["uses"] else "serves: not known"
        print(f"{row['name']}  {row['words']}  {row['bytes'] / 1024:.0f} KB  {serves}")
    total = sum(row["bytes"] for row in rows)
    print(f"{len(rows)} kernels, {total / 1e6:.1f} MB{_whose(manifest)}")


def _row(path: Path, manifest: Manifest | None, plan: PlanFile | None) -> dict[str, Any]:
    source = path / "kernel.cu"
    config = config_of_source(source.read_text(errors="replace")) if source.is_file() else {}
    name = path.name.split(".")[1] if path.name.count(".") == 2 else path.name
    uses: list[dict[str, Any]] = []
    if plan is not None:
        uses = plan.uses_of(name, config)
    elif manifest is not None and path.name in manifest.entries:
        uses = manifest.entries[path.name].uses
    return {
        "cache_key": path.name,
        "name": name,
        "words": in_words(config) or "not a generated kernel",
        "config": config,
        "bytes": size_of(path),
        "uses": uses,
    }


def _order(row: dict[str, Any]) -> tuple[str, int, str]:
    """By name, then by the first M that is served; keys alone would shuffle alike kernels."""
    first = min((use["m_ranges"][0][0] for use in row["uses"]), default=0)
    return row["name"], first, row["words"]


def _whose(manifest: Manifest | None) -> str:
    if manifest is None:
        return "; no manifest"
    return f"; for {manifest.library}, {manifest.signature}, built for {'; '.join(manifest.plans)}"


@cache.command()
@click.argument("directory", type=_directory)
@_plan_option
@target_options
def verify(
    directory: Path, plan_path: Path | None, target_root: Path | None, cuda_version: str | None
) -> None:
    """Check every entry against manifest, plan and library; exit code 1 where any is wrong."""
    found = _existing(directory)
    manifest = read_manifest(directory)
    plan = read_plan_file(plan_path) if plan_path else None
    expected = _expectation(manifest, plan, target_root, cuda_version)
    findings = verify_cache(found, expected)
    _show(findings)
    checked = [f"{found.count()} entries"]
    checked += ["manifest"] * (manifest is not None) + ["plan"] * (plan is not None)
    checked += ["headers"] * (expected.library is not None)
    if findings:
        kinds = Counter(finding.problem.value for finding in findings)
        words = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise WorkFailedError(f"{directory}: {words}")
    print(f"{directory} is whole: checked {', '.join(checked)}")


def _expectation(
    manifest: Manifest | None,
    plan: PlanFile | None,
    target_root: Path | None,
    cuda_version: str | None,
) -> Expectation:
    library = find_library()
    wanted = plan.keys if plan else list(manifest.entries if manifest else ())
    known = {*wanted, *(manifest.entries if manifest else ())}
    signature, flags = (manifest.signature, manifest.flags) if manifest else (None, None)
    if plan is not None and plan.flags is not None:
        signature, flags = plan.signature, plan.flags
    if target_root is not None or cuda_version is not None:
        keys = _keys(target_root, cuda_version)
        if target_root is None and flags is not None:
            raise UserError("--cuda-version needs --target-root here: keys hold both")
        signature, flags = keys.signature, keys.flags
    return Expectation(
        wanted=wanted,
        known=known if manifest or plan else None,
        signature=signature,
        flags=flags,
        library=library,
        manifest=manifest,
    )


def _show(findings: list[Finding]) -> None:
    for finding in findings[:_SHOWN]:
        print(f"{finding.problem.value}: {finding.key} {finding.words}")
    if len(findings) > _SHOWN:
        print(f"... and {len(findings) - _SHOWN} more")


@cache.command()
@click.argument("directory", type=_directory)
@target_options
@click.option("--to", type=_directory, required=True, help="Where the new entries go.")
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
    directory: Path, target_root: Path | None, cuda_version: str | None, to: Path,
    from_root: Path | None, from_cuda: str | None,
) -> None:  # fmt: skip
    """Copy a cache so that it hits at another install path or with a newer compiler."""
    source = _existing(directory)
    if target_root is None:
        raise UserError("--target-root PATH is needed: where deep_gemm lies on that machine")
    manifest = _origin(source, from_root, from_cuda)
    release = cuda_version or manifest.signature.removeprefix("NVCC")
    keys = _keys(target_root, release)
    if to.resolve() == directory.resolve():
        raise UserError(f"--to {to} must be another directory: a cache is for one machine")
    target = KernelCache(to)
    target.prepare()
    with locked(to), progress("relocate") as shown:
        check_target(to, replace(manifest, signature=keys.signature, flags=keys.flags))
        result = relocate_cache(source, manifest, keys, target, progress=counting(shown))
        merge_manifest(to, result.manifest)
    _show(result.refused)
    print(
        f"{result.placed} kernels placed in {target.root} for {target_root} and "
        f"{keys.signature}, {result.present} were there"
    )
    if result.refused:
        raise WorkFailedError(f"{len(result.refused)} entries could not be relocated")


def _origin(source: KernelCache, from_root: Path | None, from_cuda: str | None) -> Manifest:
    """The manifest, or one made from what the user says of a cache that the library made."""
    manifest = read_manifest(source.root)
    if manifest is not None:
        return manifest
    if from_root is None or from_cuda is None:
        raise UserError(
            f"{source.root} has no manifest: say what it was built for with --from-root PATH and "
            "--from-cuda X.Y"
        )
    keys = _keys(from_root, from_cuda)
    entries: dict[str, Entry] = {}
    for path in source.entries():
        if path.is_dir() and source.has(path.name) and path.name.count(".") == 2:
            entries[path.name] = describe_entry(path, path.name.split(".")[1], [])
    return Manifest(
        library="sgl-deep-gemm of that cache", arch="sm_90a", signature=keys.signature,
        flags=keys.flags, built_with=keys.signature, entries=entries,
    )  # fmt: skip


@cache.command()
@click.argument("directory", type=_directory)
@click.argument("archive", type=click.Path(path_type=Path, dir_okay=False))
def pack(directory: Path, archive: Path) -> None:
    """Pack the manifest's kernels into one reproducible ARCHIVE (tar.gz)."""
    found = _existing(directory)
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(f"{directory} has no manifest: build it with runner compile")
    size = pack_cache(found, manifest, archive)
    print(f"{archive}: {len(manifest.entries)} kernels, {size / 1e6:.1f} MB")


@cache.command()
@click.argument("archive", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("directory", type=_directory)
def unpack(archive: Path, directory: Path) -> None:
    """Place an ARCHIVE's kernels in a cache; those that are rightly there stay."""
    if not archive.is_file():
        raise UserError(f"{archive} is not a file: it must be an archive of runner cache pack")
    target = KernelCache(directory)
    target.prepare()
    with locked(directory), progress("unpack") as shown:
        manifest, placed = unpack_archive(archive, target, progress=counting(shown))
        merge_manifest(directory, manifest)
    there = len(manifest.entries) - placed
    print(f"{directory}: {placed} kernels placed, {there} were there")


@cache.command()
@click.argument("directory", type=_directory)
@click.option(
    "--plan",
    "plan_paths",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="JSON of runner plan; kernels of any given plan stay.",
)
@click.option("--yes", is_flag=True, help="Really remove; without it only tell what would go.")
def prune(directory: Path, plan_paths: tuple[Path, ...], yes: bool) -> None:
    """Remove kernels that no given plan needs."""
    found = _existing(directory)
    plans = [read_plan_file(path) for path in plan_paths]
    wanted = {key for plan in plans for key in plan.keys}
    _check_same_machine(directory, plans)
    # Without --yes nothing is written, not even a lock: the cache may be one that only is read.
    with locked(directory) if yes else nullcontext():
        entries = superfluous(found, wanted)
        kept = sum(path.name in wanted for path in found.entries())
        if entries and not kept:
            raise UserError(
                f"{directory} holds none of the planned kernels: the plan is for another machine "
                "or model; remove the directory if nothing of it is wanted"
            )
        for path in entries:
            print(f"{'remove' if yes else 'would remove'} {path.name}")
        if yes:
            freed = prune_entries(found, entries)
            print(f"{len(entries)} kernels removed, {freed / 1e6:.1f} MB; {kept} stay")
        else:
            freed = sum(size_of(path) for path in entries)
            print(
                f"{len(entries)} kernels would go, {freed / 1e6:.1f} MB; {kept} stay "
                "(--yes removes them)"
            )


def _check_same_machine(directory: Path, plans: list[PlanFile]) -> None:
    """A plan for another machine needs none of these keys: it would remove them all."""
    manifest = read_manifest(directory)
    for plan in plans:
        if manifest is None or plan.flags is None:
            continue
        if (plan.signature, plan.flags) != (manifest.signature, manifest.flags):
            raise UserError(
                f"the plan of {plan.title} is for another machine than {directory}: make it with "
                "the --target-root and --cuda-version that the cache was built with"
            )


def _existing(directory: Path) -> KernelCache:
    if not (directory / "cache").is_dir():
        raise UserError(f"{directory} is not a kernel cache: it has no folder named cache")
    return KernelCache(directory)


def _keys(root: Path | None, cuda_version: str | None) -> CacheKeys:
    target = find_target(root, cuda_version)
    if target.keys is None:
        raise UserError(target.lacking)
    return target.keys
