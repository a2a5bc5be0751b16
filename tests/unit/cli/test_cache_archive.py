"""``runner cache pack`` and ``unpack``."""

from dataclasses import replace
from pathlib import Path

import pytest

from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import Manifest, read_manifest, sha256, write_manifest
from runner.kernels.installed import Library
from tests.unit.cache_cli import (
    ELSEWHERE,
    ROOT,
    Capture,
    assert_prints,
    assert_progress,
    assert_refused,
    assert_says_waiting,
    cache,
    plan_file,
)
from tests.unit.elf import tiny_cubin
from tests.unit.small_cache import contents, fill, keys_for, small_plan

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def archive(directory: Path, tmp_path: Path, capsys: Capture) -> Path:
    path = tmp_path / "x.tar.gz"
    assert cache("pack", directory, path) == 0
    assert_prints(capsys, f"{path}: 4 kernels, 0.0 MiB")
    return path


def test_unpacked_cache_equals_the_packed_one_and_packs_to_the_same_bytes(
    archive: Path, directory: Path, tmp_path: Path, capsys: Capture
) -> None:
    target = tmp_path / "deep" / "target"
    assert cache("unpack", archive, target) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{target}: 4 kernels placed, 0 already there\n"
    assert_progress(captured.err, "unpack", 4)
    assert contents(target) == contents(directory)
    assert cache("verify", target, "--target-root", ROOT) == 0
    assert cache("pack", target, tmp_path / "y.tar.gz") == 0
    assert (tmp_path / "y.tar.gz").read_bytes() == archive.read_bytes()
    capsys.readouterr()
    assert cache("unpack", archive, target) == 0
    assert capsys.readouterr().out == f"{target}: 0 kernels placed, 4 already there\n"


def test_unpack_merges_into_a_cache_that_has_some_of_the_kernels(
    archive: Path,
    made: tuple[KernelCache, Manifest],
    tmp_path: Path,
    here: Library,
    capsys: Capture,
) -> None:
    target = tmp_path / "target"
    few, _ = fill(target, keys_for(here), small_plan(max_m=16).kernels)
    manifest = read_manifest(target)
    assert manifest is not None
    write_manifest(target, replace(manifest, plans=["few"]))
    assert cache("unpack", archive, target) == 0
    assert capsys.readouterr().out == f"{target}: 2 kernels placed, 2 already there\n"
    merged = read_manifest(target)
    assert merged is not None and merged.plans == ["few", "small"]
    assert set(merged.entries) == set(made[1].entries)
    assert cache("verify", few.root, "--target-root", ROOT) == 0


def test_unpack_keeps_existing_entry_with_different_cubin(
    archive: Path, made: tuple[KernelCache, Manifest], tmp_path: Path, here: Library
) -> None:
    """Two nvcc builds may give one key two cubins; the manifest must describe the one kept."""
    target = tmp_path / "target"
    other, manifest = fill(target, keys_for(here), small_plan().kernels[:1])
    (key,) = manifest.entries
    cubin = tiny_cubin(b"another build")
    (other.entry(key) / "kernel.cubin").write_bytes(cubin)
    manifest.entries[key] = replace(  # type: ignore[index]
        manifest.entries[key], cubin_sha256=sha256(cubin), cubin_bytes=len(cubin)
    )
    write_manifest(target, manifest)
    assert cache("verify", target, "--target-root", ROOT) == 0
    assert cache("unpack", archive, target) == 0
    assert cache("verify", target, "--target-root", ROOT) == 0


def test_unpack_into_cache_for_different_machine_places_nothing(
    archive: Path, tmp_path: Path, here: Library, capsys: Capture
) -> None:
    target = tmp_path / "target"
    fill(target, keys_for(here, ELSEWHERE / "include"))
    before = contents(target)
    assert cache("unpack", archive, target) == 2
    assert "was built for another machine" in capsys.readouterr().err
    assert contents(target) == before


def test_unpack_refuses_a_file_that_is_not_an_archive(
    tmp_path: Path, directory: Path, capsys: Capture
) -> None:
    before = contents(directory)
    gone = tmp_path / "gone.tar.gz"
    assert cache("unpack", gone, tmp_path / "target") == 2
    assert_refused(capsys, f"{gone} is not a file: give an archive from runner cache pack")
    assert not (tmp_path / "target").exists()
    text = tmp_path / "text.tar.gz"
    text.write_text("no archive")
    assert cache("unpack", text, directory) == 2
    assert_refused(capsys, f"cannot read {text}: not a gzip file")
    assert contents(directory) == before


def test_pack_refuses_cache_without_manifest(
    directory: Path, tmp_path: Path, capsys: Capture
) -> None:
    (directory / "manifest.json").unlink()
    assert cache("pack", directory, tmp_path / "x.tar.gz") == 2
    assert_refused(capsys, f"{directory} has no manifest: build it with runner compile")
    assert not (tmp_path / "x.tar.gz").exists()


def test_pack_refuses_incomplete_entry(
    made: tuple[KernelCache, Manifest], tmp_path: Path, capsys: Capture
) -> None:
    cache_, manifest = made
    half = cache_.entry(min(manifest.entries))
    (half / "kernel.cu").unlink()
    assert cache("pack", cache_.root, tmp_path / "x.tar.gz") == 2
    assert_refused(capsys, f"corrupted cache entry {half}: kernel.cu missing; remove it")


def test_cache_that_cannot_be_locked_is_packed_but_not_pruned(
    directory: Path, tmp_path: Path, here: Library, capsys: Capture
) -> None:
    """As in a read-only image, where not even root can write."""
    (directory / ".lock").mkdir()
    plan = plan_file(tmp_path / "plan.json", here)
    assert cache("pack", directory, tmp_path / "x.tar.gz") == 0
    assert cache("prune", directory, "--plan", plan) == 0
    capsys.readouterr()
    assert cache("prune", directory, "--plan", plan, "--yes") == 2
    assert capsys.readouterr().err == f"error: cannot lock {directory}: Is a directory\n"


def test_unpack_says_that_it_waits_for_another_builder(
    archive: Path, directory: Path, capsys: Capture
) -> None:
    assert_says_waiting(capsys, directory, lambda: cache("unpack", archive, directory))
    assert capsys.readouterr().out.endswith("0 kernels placed, 4 already there\n")


def test_refused_archive_leaves_no_cache(tmp_path: Path, capsys: Capture) -> None:
    text, target = tmp_path / "text.tar.gz", tmp_path / "deep" / "target"
    text.write_text("no archive")
    assert cache("unpack", text, target) == 2
    assert_refused(capsys, f"cannot read {text}: not a gzip file")
    assert not target.parent.exists()


def test_pack_takes_a_list_of_directories_and_unpack_does_not(
    archive: Path, directory: Path, tmp_path: Path, capsys: Capture
) -> None:
    listed = f"{directory}:{tmp_path}/below"
    assert cache("pack", listed, tmp_path / "y.tar.gz") == 0
    assert (tmp_path / "y.tar.gz").read_bytes() == archive.read_bytes()
    capsys.readouterr()
    assert cache("unpack", archive, listed) == 2
    assert_refused(capsys, f"{listed} is a list of directories: give the one to write to")
