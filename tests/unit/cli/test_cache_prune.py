"""``runner cache prune``: what it shows, removes and refuses."""

from pathlib import Path
from typing import Any

import pytest

from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import Manifest, read_manifest
from runner.kernels.installed import Library
from tests.unit.cache_cli import (
    ELSEWHERE,
    ROOT,
    Capture,
    assert_prints,
    assert_refused,
    assert_says_waiting,
    cache,
    plan_file,
)
from tests.unit.kept_cache import remove
from tests.unit.small_cache import contents, fill, keys_for, small_plan

pytestmark = pytest.mark.usefixtures("here")


def unneeded(manifest: Manifest, tmp_path: Path, here: Library) -> tuple[Path, list[str]]:
    """A plan for M up to 16, and the keys of the kernels it does not need."""
    keys = keys_for(here)
    kept = {keys.cache_key(item.kernel) for item in small_plan(max_m=16).kernels}
    plan = plan_file(tmp_path / "few.json", here, max_m=16)
    return plan, sorted(set(manifest.entries) - kept)


def test_prune_without_yes_only_shows_what_would_go(
    made: tuple[KernelCache, Manifest], tmp_path: Path, here: Library, capsys: Capture
) -> None:
    cache_, manifest = made
    plan, keys = unneeded(manifest, tmp_path, here)
    before = contents(cache_.root)
    assert cache("prune", cache_.root, "--plan", plan) == 0
    assert_prints(
        capsys,
        *(f"would remove {key}" for key in keys),
        "2 kernels would go, 0.0 MiB; 2 stay (--yes removes them)",
    )
    assert contents(cache_.root) == before


def test_prune_with_yes_removes_unneeded_kernels(
    made: tuple[KernelCache, Manifest], tmp_path: Path, here: Library, capsys: Capture
) -> None:
    cache_, manifest = made
    plan, keys = unneeded(manifest, tmp_path, here)
    cache_.entry("notes.txt").write_text("mine")
    assert cache("prune", cache_.root, "--plan", plan, "--yes") == 0
    assert_prints(
        capsys,
        *(f"remove {key}" for key in keys),
        "2 kernels removed, 0.0 MiB; 2 stay",
    )
    assert {path.name for path in cache_.entries()} == {
        "notes.txt",
        *(set(manifest.entries) - set(keys)),
    }
    assert read_manifest(cache_.root) == manifest.without(set(keys))
    (cache_.root / "cache" / "notes.txt").unlink()
    assert cache("verify", cache_.root, "--plan", plan, "--target-root", ROOT) == 0


def test_prune_keeps_kernels_that_any_given_plan_needs(
    made: tuple[KernelCache, Manifest], tmp_path: Path, here: Library, capsys: Capture
) -> None:
    cache_, manifest = made
    plan, _ = unneeded(manifest, tmp_path, here)
    whole = plan_file(tmp_path / "all.json", here)
    before = contents(cache_.root)
    assert cache("prune", cache_.root, "--plan", plan, "--plan", whole, "--yes") == 0
    assert_prints(capsys, "0 kernels removed, 0.0 MiB; 4 stay")
    assert contents(cache_.root) == before


@pytest.mark.parametrize("yes", [[], ["--yes"]])
@pytest.mark.parametrize(
    "values",
    [{"include_path": ELSEWHERE / "include"}, {"signature": "NVCC13.1"}],
    ids=["path", "compiler"],
)
def test_prune_refuses_a_plan_for_another_machine(
    values: dict[str, Any],
    yes: list[str],
    directory: Path,
    tmp_path: Path,
    here: Library,
    capsys: Capture,
) -> None:
    before = contents(directory)
    ours = plan_file(tmp_path / "ours.json", here)
    theirs = plan_file(tmp_path / "theirs.json", here, **values)
    assert cache("prune", directory, "--plan", ours, "--plan", theirs, *yes) == 2
    assert_refused(
        capsys,
        f"the plan of a plan is for another machine than {directory}: make it with the "
        "--target-root and --cuda-version that the cache was built with",
    )
    assert contents(directory) == before


def test_prune_counts_only_wanted_kernels_as_staying(
    made: tuple[KernelCache, Manifest], tmp_path: Path, here: Library, capsys: Capture
) -> None:
    cache_, manifest = made
    plan, keys = unneeded(manifest, tmp_path, here)
    remove(cache_.entry(next(key for key in manifest.entries if key not in keys)))
    cache_.entry("folder").mkdir()
    assert cache("prune", cache_.root, "--plan", plan) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "2 kernels would go, 0.0 MiB; 1 stay (--yes removes them)"
    )


def test_prune_needs_a_plan(directory: Path, capsys: Capture) -> None:
    assert cache("prune", directory) == 2
    assert_refused(capsys, "Missing option '--plan'.")


def test_prune_says_that_it_waits_for_another_builder(
    made: tuple[KernelCache, Manifest], tmp_path: Path, here: Library, capsys: Capture
) -> None:
    plan, _ = unneeded(made[1], tmp_path, here)
    root = made[0].root
    assert_says_waiting(capsys, root, lambda: cache("prune", root, "--plan", plan, "--yes"))
    assert len(made[0].entries()) == 2


def test_prune_leaves_read_only_directories_as_they_are(
    made: tuple[KernelCache, Manifest], tmp_path: Path, here: Library, capsys: Capture
) -> None:
    """The writable directory holds one kernel that the plan needs and one that it does not."""
    below, manifest = made
    plan, unneeded_keys = unneeded(manifest, tmp_path, here)
    needed = next(item for item in small_plan(max_m=16).kernels)
    spare = next(
        i for i in small_plan().kernels if keys_for(here).cache_key(i.kernel) in unneeded_keys
    )
    writable, _ = fill(tmp_path / "top", keys_for(here), [needed, spare])
    before = contents(below.root)
    listed = f"{writable.root}:{below.root}"
    assert cache("prune", listed, "--plan", plan, "--yes") == 0
    assert capsys.readouterr().out.endswith("\n1 kernels removed, 0.0 MiB; 2 stay\n")
    assert contents(below.root) == before
    left = read_manifest(writable.root)
    assert left is not None and list(left.entries) == [p.name for p in writable.entries()]
    assert list(left.entries) == [keys_for(here).cache_key(needed.kernel)]
