"""Prune: what no plan needs goes, and how large entries are."""

from pathlib import Path

from runner.cache.kernel_cache import KernelCache
from runner.cache.keys import CacheKeys
from runner.cache.manifest import Manifest, read_manifest
from runner.cache.prune import prune, size_of, superfluous
from runner.kernels.installed import Library
from tests.unit.kept_cache import first_of, halve
from tests.unit.small_cache import ENTRY_BYTES, add, contents, small_plan


def test_prune_takes_what_no_plan_needs(
    made: tuple[KernelCache, Manifest], keys: CacheKeys, here: Library
) -> None:
    cache, manifest = made
    wanted = [keys.cache_key(item.kernel) for item in small_plan(max_m=16).kernels]
    going = sorted(set(manifest.entries) - set(wanted))
    assert (len(wanted), len(going)) == (2, 2)
    cache.entry("notes.txt").write_text("mine")
    cache.entry("kernel.txt").write_text("mine")
    cache.entry("folder").mkdir()
    found = superfluous(cache, wanted)
    assert found == [cache.entry(key) for key in going]
    assert prune(cache, found) == 2 * ENTRY_BYTES
    assert [path.name for path in cache.entries()] == sorted(
        [*wanted, "folder", "kernel.txt", "notes.txt"]
    )
    assert read_manifest(cache.root) == manifest.without(set(going))
    assert list((cache.root / "tmp").iterdir()) == []
    assert superfluous(cache, wanted) == []


def test_prune_without_a_manifest(made: tuple[KernelCache, Manifest]) -> None:
    cache, manifest = made
    (cache.root / "manifest.json").unlink()
    assert prune(cache, superfluous(cache, ())) == len(manifest.entries) * ENTRY_BYTES
    assert contents(cache.root) == {}


def test_prune_takes_half_entries_too(made: tuple[KernelCache, Manifest]) -> None:
    key, path = first_of(made)
    halve(path)
    prune(made[0], [path])
    assert key not in {each.name for each in made[0].entries()}


def test_prune_takes_a_link_and_leaves_what_it_names(
    made: tuple[KernelCache, Manifest], tmp_path: Path
) -> None:
    _, path = first_of(made)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    prune(made[0], [path])
    assert not path.is_symlink()
    assert sorted(contents(tmp_path / "elsewhere")) == ["kernel.cu", "kernel.cubin"]


def test_size_of(tmp_path: Path, made: tuple[KernelCache, Manifest]) -> None:
    assert size_of(first_of(made)[1]) == ENTRY_BYTES
    assert size_of(tmp_path / "nowhere") == 0


def test_the_helper_adds_what_the_plan_names(tmp_path: Path, keys: CacheKeys) -> None:
    cache = KernelCache(tmp_path / "one")
    item = small_plan().kernels[0]
    key = add(cache, keys, item)
    assert key == keys.cache_key(item.kernel) and size_of(cache.entry(key)) == ENTRY_BYTES
