"""``runner cache``: list, verify, relocate, pack, unpack and prune kernel caches."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from runner.cache.archive import check_archive
from runner.cache.archive import pack as pack_cache
from runner.cache.archive import unpack as unpack_archive
from runner.cache.kernel_cache import KernelCache, size_of
from runner.cache.lock import locked, say_waiting
from runner.cache.machine import compiler_words
from runner.cache.manifest import Manifest, Use, merge_manifest, read_manifest, remove_entries
from runner.cache.plan_file import PlanFile, read_plan_file, uses_in_words
from runner.cli.cache_machine import directory_type, plan_option, relocate, verify
from runner.errors import UserError
from runner.files import write_json
from runner.kernels.describe import Config, config_of_source, in_words
from runner.kernels.entry import SOURCE, format_of, kernel_name
from runner.report.progress import counting, progress


@click.group()
def cache() -> None:
    """List, verify, move and pack kernel caches (DG_JIT_CACHE_DIR directories)."""


cache.add_command(verify)
cache.add_command(relocate)


@dataclass(frozen=True)
class _Row:
    """An entry in the list of ``ls``."""

    cache_key: str
    name: str
    words: str
    config: Config
    bytes: int
    uses: list[Use]

    @property
    def order(self) -> tuple[str, int, str]:
        """Sort by name, then by the first M served; the order of keys is arbitrary."""
        return self.name, min((use["m_ranges"][0][0] for use in self.uses), default=0), self.words


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
    """List kernels with their names, configurations and the M that each serves."""
    found = KernelCache.existing(directory)
    manifest = read_manifest(found.root)
    plan = read_plan_file(plan_path) if plan_path else None
    rows = sorted((_row(path, manifest, plan) for path in found.entries()), key=lambda r: r.order)
    if json_path is not None:
        write_json(json_path, {"version": 1, "kernels": list(map(asdict, rows))}, indent=1)
    if str(json_path) == "-":
        return
    for row in rows:
        serves = uses_in_words(row.uses) if row.uses else "serves: not known"
        print(f"{row.name}  {row.words}  {row.bytes / 1024:.0f} KiB  {serves}")
    built = "no manifest"
    if manifest is not None:
        compiler, plans = compiler_words(manifest.signature), "; ".join(manifest.plans)
        built = f"for {manifest.library}, {compiler}, built for {plans}"
    print(f"{len(rows)} kernels, {_mebibytes(sum(row.bytes for row in rows))}; {built}")


def _row(path: Path, manifest: Manifest | None, plan: PlanFile | None) -> _Row:
    source = path / SOURCE
    config = config_of_source(source.read_text(errors="replace")) if source.is_file() else {}
    name = kernel_name(path.name)
    uses: list[Use] = []
    if plan is not None:
        uses = plan.uses_of(name, config)
    elif manifest is not None and path.name in manifest.entries:
        uses = manifest.entries[path.name].uses
    words = in_words(config) or "not a generated kernel"
    return _Row(path.name, name, words, config, size_of(path), uses)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


@cache.command()
@click.argument("directory", type=directory_type)
@click.argument("archive", type=click.Path(path_type=Path, dir_okay=False))
def pack(directory: Path, archive: Path) -> None:
    """Pack the manifest's kernels into one reproducible ARCHIVE (tar.gz)."""
    found = KernelCache.existing(directory)
    manifest = read_manifest(found.root)
    if manifest is None:
        raise UserError(f"{directory} has no manifest: build it with runner compile")
    size = pack_cache(found, manifest, archive)
    print(f"{archive}: {len(manifest.entries)} kernels, {_mebibytes(size)}")


@cache.command()
@click.argument("archive", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("directory", type=directory_type)
def unpack(archive: Path, directory: Path) -> None:
    """Place an ARCHIVE's kernels in a cache; intact kernels that are already there stay."""
    if not archive.is_file():
        raise UserError(f"{archive} is not a file: give an archive from runner cache pack")
    target = KernelCache.writable(directory)
    check_archive(archive)
    target.prepare()
    with locked(directory, on_wait=say_waiting), progress("unpack") as shown:
        manifest, placed = unpack_archive(archive, target, counting(shown))
        merge_manifest(directory, manifest)
    there = len(manifest.entries) - placed
    print(f"{directory}: {placed} kernels placed, {there} already there")


@cache.command()
@click.argument("directory", type=directory_type)
@click.option(
    "--plan",
    "plan_paths",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="JSON from runner plan; kernels of every given plan stay.",
)
@click.option("--yes", is_flag=True, help="Remove them; without it, only show what would go.")
def prune(directory: Path, plan_paths: tuple[Path, ...], yes: bool) -> None:
    """Remove kernels that no given plan needs; read-only directories stay as they are."""
    found = KernelCache.existing(directory)
    plans = [read_plan_file(path) for path in plan_paths]
    wanted = {key for plan in plans for key in plan.keys}
    manifest = read_manifest(found.root)
    for plan in plans:
        # A plan for another machine has none of these keys: it would remove them all.
        if manifest and plan.target and not manifest.same_target(plan.target):
            raise UserError(
                f"the plan of {plan.title} is for another machine than {directory}: make it with "
                "the --target-root and --cuda-version that the cache was built with"
            )
    # Without --yes write nothing, not even a lock: the cache may be read-only.
    with locked(found.root, on_wait=say_waiting) if yes else nullcontext():
        entries = found.entries()
        kept = sum(path.name in wanted for path in entries)
        going = [
            path
            for path in entries
            if path.name not in wanted
            and format_of(path.name)
            and path.is_dir()
            and path.parent.parent == found.root  # The others are only read.
        ]
        if going and not kept:
            raise UserError(
                f"{directory} holds none of the planned kernels: the plan is for another machine "
                "or model; remove the directory if nothing in it is needed"
            )
        for path in going:
            print(f"{'remove' if yes else 'would remove'} {path.name}")
        if yes:
            freed = _mebibytes(remove_entries(found, going))
            print(f"{len(going)} kernels removed, {freed}; {kept} stay")
        else:
            freed = _mebibytes(sum(map(size_of, going)))
            print(f"{len(going)} kernels would go, {freed}; {kept} stay (--yes removes them)")
