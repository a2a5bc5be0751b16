"""Relocation: copying a cache under another machine's keys, and refused entries."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from runner.cache.kernel_cache import KernelCache
from runner.cache.machine import relocate
from runner.cache.manifest import Manifest, write_manifest
from runner.cache.verify import verify
from runner.errors import UserError
from runner.kernels.installed import Library
from tests.unit.kept_cache import change, expected, first_of, make_incomplete, one_line, remove
from tests.unit.small_cache import (
    NVCC_TEXT,
    contents,
    cubin_for,
    fill,
    keys_for,
    second_keys_for,
    second_library,
    small_library,
    small_plan,
)

OTHER_ROOT = Path("/opt/other/deep_gemm/include")


def cubins(cache: KernelCache) -> dict[str, bytes]:
    return {path.name: (path / "kernel.cubin").read_bytes() for path in cache.entries()}


@pytest.mark.parametrize("signature", ["NVCC13.0", "NVCC13.1", "NVCC14.0"])
def test_relocated_cache_has_the_target_machines_keys_and_same_cubins(
    made: tuple[KernelCache, Manifest], here: Library, tmp_path: Path, signature: str
) -> None:
    cache, manifest = made
    before = contents(cache.root)
    there = keys_for(here, OTHER_ROOT, signature)
    target = KernelCache(tmp_path / "target")
    progress: list[tuple[int, int]] = []
    moved, placed, refused = relocate(
        cache, manifest, there, here, target, progress=lambda *numbers: progress.append(numbers)
    )
    assert (placed, refused) == (4, [])
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert cubins(target) == {
        there.cache_key(item.kernel): cubin_for(there.source(item.kernel))
        for item in small_plan().kernels
    }
    assert sorted(cubins(target).values()) == sorted(cubins(cache).values())
    assert contents(cache.root) == before
    assert (moved.signature, moved.flags) == (signature, there.flags)
    assert (moved.built_with, moved.plans, moved.library) == (
        "NVCC13.0",
        manifest.plans,
        manifest.library,
    )
    assert verify(target, expected(moved, here)) == []
    uses = {name: entry.uses for name, entry in manifest.entries.items()}
    for item in small_plan().kernels:
        at_target = moved.entries[there.cache_key(item.kernel)]
        assert at_target.uses == uses[keys_for(here).cache_key(item.kernel)]
        assert at_target.name == item.kernel.name


def test_second_relocation_places_nothing(
    made: tuple[KernelCache, Manifest], here: Library, tmp_path: Path
) -> None:
    there, target = keys_for(here, OTHER_ROOT), KernelCache(tmp_path / "target")
    first, _, _ = relocate(*made, there, here, target)
    before = contents(target.root)
    assert relocate(*made, there, here, target) == (first, 0, [])
    assert contents(target.root) == before


def test_relocation_for_the_same_machine_is_a_copy(
    made: tuple[KernelCache, Manifest], here: Library, tmp_path: Path
) -> None:
    target = KernelCache(tmp_path / "target")
    assert relocate(*made, keys_for(here), here, target) == (made[1], 4, [])
    write_manifest(target.root, made[1])
    assert contents(target.root) == contents(made[0].root)


def cut(path: Path) -> None:
    (path / "kernel.cubin").write_bytes((path / "kernel.cubin").read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "problem", "words"),
    [
        (cut, "truncated", "kernel.cubin is cut short"),
        (change, "changed", "kernel.cubin is not what was built"),
        (make_incomplete, "truncated", "kernel.cubin is missing: the library aborts on this entry"),
        (remove, "missing", "is not in the cache"),
    ],
    ids=["truncated", "changed", "incomplete", "missing"],
)
def test_relocation_refuses_damaged_entries(
    made: tuple[KernelCache, Manifest],
    here: Library,
    tmp_path: Path,
    damage: Callable[[Path], None],
    problem: str,
    words: str,
) -> None:
    key, path = first_of(made)
    damage(path)
    there, target = keys_for(here, OTHER_ROOT), KernelCache(tmp_path / "target")
    moved, placed, (refused,) = relocate(*made, there, here, target)
    assert (refused.problem, refused.key) == (problem, key)
    assert refused.words.startswith(words)
    assert (placed, len(moved.entries), len(target.entries())) == (3, 3, 3)
    assert verify(target, expected(moved, here)) == []


def test_relocation_refuses_entries_from_different_headers(
    made: tuple[KernelCache, Manifest], tmp_path: Path
) -> None:
    other = small_library(tmp_path / "newer", "int b;\n")
    target = KernelCache(tmp_path / "target")
    moved, placed, refused = relocate(*made, keys_for(other, OTHER_ROOT), other, target)
    assert [each.problem for each in refused] == ["wrong version"] * 4
    assert (placed, len(target.entries()), moved.entries) == (0, 0, {})


@pytest.mark.parametrize(
    ("built", "wanted"), [("13.1", "13.0"), ("13.0", "12.9"), ("13.10", "13.9")]
)
def test_relocation_to_older_nvcc_is_refused(
    made: tuple[KernelCache, Manifest], here: Library, tmp_path: Path, built: str, wanted: str
) -> None:
    target = KernelCache(tmp_path / "target")
    manifest = replace(made[1], built_with=f"NVCC{built}")
    with pytest.raises(UserError) as caught:
        relocate(made[0], manifest, keys_for(here, OTHER_ROOT, f"NVCC{wanted}"), here, target)
    assert one_line(caught) == (
        f"the cache was built with CUDA {built} and cannot move to CUDA {wanted}: a driver may not "
        f"load what a newer compiler made; build it with nvcc {wanted}"
    )
    assert len(target.entries()) == 0


def test_relocation_of_cache_built_with_unknown_compiler_is_refused(
    made: tuple[KernelCache, Manifest], here: Library
) -> None:
    with pytest.raises(UserError) as caught:
        relocate(made[0], replace(made[1], built_with="clang"), keys_for(here), here, made[0])
    assert one_line(caught) == (
        "the compiler's version text 'clang' has no CUDA release, such as NVCC13.0 or "
        "'release 13.0'"
    )


def test_generation_2_cache_relocates_to_different_compiler(tmp_path: Path) -> None:
    here = second_library(tmp_path / "deep_gemm")
    cache, manifest = fill(tmp_path / "made", second_keys_for(here))
    there = second_keys_for(here, NVCC_TEXT.replace("01:58:59", "02:00:00"))
    target = KernelCache(tmp_path / "target")
    moved, placed, refused = relocate(cache, manifest, there, here, target)
    assert (placed, refused) == (4, [])
    assert moved.signature == there.signature
    assert moved.built_with == NVCC_TEXT
    assert set(moved.entries) == {there.cache_key(item.kernel) for item in small_plan().kernels}
    assert set(moved.entries).isdisjoint(manifest.entries)
    for path in target.entries():
        assert {file.name: file.read_bytes() for file in path.iterdir()} == {
            "kernel.cu": (path / "kernel.cu").read_bytes(),
            "kernel.cubin": cubin_for((path / "kernel.cu").read_text()),
            **there.extra_files,
        }
    assert verify(target, expected(moved, here)) == []


def test_relocation_of_generation_1_cache_to_generation_2_is_refused(
    made: tuple[KernelCache, Manifest], tmp_path: Path
) -> None:
    newer = second_library(tmp_path / "newer", "int b;\n")
    target = KernelCache(tmp_path / "target")
    _, placed, refused = relocate(*made, keys_for(newer, OTHER_ROOT), newer, target)
    assert (placed, len(refused)) == (0, 4)
