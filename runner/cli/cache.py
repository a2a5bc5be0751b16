"""``runner cache``: list, verify, relocate, pack, unpack and prune kernel caches."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from runner.cache.archive import pack as pack_cache
from runner.cache.archive import unpack as unpack_archive
from runner.cache.describe import config_of_source, in_words
from runner.cache.entry import kernel_name
from runner.cache.kernel_cache import KernelCache
from runner.cache.machine import compiler_words
from runner.cache.manifest import (
    Manifest,
    locked,
    merge_manifest,
    read_manifest,
)
from runner.cache.plan_file import PlanFile, read_plan_file, uses_in_words
from runner.cache.prune import prune as prune_entries
from runner.cache.prune import size_of, superfluous
from runner.cli.cache_machine import directory_type, existing, plan_option, relocate, verify
from runner.errors import UserError
from runner.files import write_json
from runner.report.progress import counting, progress


@click.group()
def cache() -> None:
    """List, verify, move and pack kernel caches (DG_JIT_CACHE_DIR directories)."""


cache.add_command(verify)
cache.add_command(relocate)


@cache.command()
@click.argument("directory", type=directory_type)
@plan_option
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    help="Write the list as JSON (- for stdout, and nothing else).",
)
def ls(directory: Path, plan_path: Path | None, json_path: Path | None) -> None:
    """List kernels in words: name, configuration, the M that each serves."""
    found = existing(directory)
    manifest = read_manifest(directory)
    plan = read_plan_file(plan_path) if plan_path else None
    rows = sorted((_row(path, manifest, plan) for path in found.entries()), key=_order)
    if json_path is not None:
        write_json(json_path, {"version": 1, "kernels": rows}, indent=1)
    if str(json_path) == "-":
        return
    for row in rows:
        serves = uses_in_words(row["uses"]) if row["uses"] else "serves: not known"
        print(f"{row['name']}  {row['words']}  {row['bytes'] / 1024:.0f} KiB  {serves}")
    total = sum(row["bytes"] for row in rows)
    print(f"{len(rows)} kernels, {total / 1e6:.1f} MB{_whose(manifest)}")


def _row(path: Path, manifest: Manifest | None, plan: PlanFile | None) -> dict[str, Any]:
    source = path / "kernel.cu"
    config = config_of_source(source.read_text(errors="replace")) if source.is_file() else {}
    name = kernel_name(path.name)
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
    compiler, plans = compiler_words(manifest.signature), "; ".join(manifest.plans)
    return f"; for {manifest.library}, {compiler}, built for {plans}"


@cache.command()
@click.argument("directory", type=directory_type)
@click.argument("archive", type=click.Path(path_type=Path, dir_okay=False))
def pack(directory: Path, archive: Path) -> None:
    """Pack the manifest's kernels into one reproducible ARCHIVE (tar.gz)."""
    found = existing(directory)
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(f"{directory} has no manifest: build it with runner compile")
    size = pack_cache(found, manifest, archive)
    print(f"{archive}: {len(manifest.entries)} kernels, {size / 1e6:.1f} MB")


@cache.command()
@click.argument("archive", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("directory", type=directory_type)
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
@click.argument("directory", type=directory_type)
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
    found = existing(directory)
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
        if manifest is None or plan.target is None:
            continue
        if not manifest.same_target(plan.target):
            raise UserError(
                f"the plan of {plan.title} is for another machine than {directory}: make it with "
                "the --target-root and --cuda-version that the cache was built with"
            )
