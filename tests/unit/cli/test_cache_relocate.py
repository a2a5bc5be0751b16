"""``runner cache relocate``: copying a cache to another directory for another machine."""

from pathlib import Path

import pytest

from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import Manifest, read_manifest
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
)
from tests.unit.elf import tiny_cubin
from tests.unit.small_cache import (
    NVCC_TEXT,
    contents,
    fill,
    keys_for,
    second_keys_for,
    second_library,
    small_plan,
)

pytestmark = pytest.mark.usefixtures("here")


def placed_line(target: Path, placed: int, present: int, release: str = "13.0") -> str:
    return (
        f"{placed} kernels placed in {target} for {ELSEWHERE} and nvcc {release}, "
        f"{present} already there"
    )


@pytest.mark.parametrize("release", [[], ["--cuda-version", "13.1"]])
def test_relocated_cache_verifies_on_the_target_machine(
    release: list[str], directory: Path, tmp_path: Path, here: Library, capsys: Capture
) -> None:
    before = contents(directory)
    target = tmp_path / "target"
    command = ["relocate", directory, "--target-root", ELSEWHERE, "--to", target, *release]
    there = "13.1" if release else "13.0"
    assert cache(*command) == 0
    captured = capsys.readouterr()
    assert captured.out == placed_line(target, 4, 0, there) + "\n"
    assert_progress(captured.err, "relocate", 4)
    keys = keys_for(here, ELSEWHERE / "include", f"NVCC{there}")
    manifest = read_manifest(target)
    assert manifest is not None
    assert set(manifest.entries) == {keys.cache_key(item.kernel) for item in small_plan().kernels}
    assert contents(directory) == before
    assert cache("verify", target, "--target-root", ELSEWHERE, *release) == 0
    assert_prints(capsys, f"{target} is whole: checked 4 entries, manifest, this machine")
    assert cache(*command) == 0
    assert capsys.readouterr().out == placed_line(target, 0, 4, there) + "\n"


def test_relocate_requires_to_option(directory: Path, capsys: Capture) -> None:
    before = contents(directory)
    assert cache("relocate", directory, "--target-root", ELSEWHERE) == 2
    assert_refused(capsys, "Missing option '--to'.")
    assert contents(directory) == before


@pytest.mark.parametrize("name", ["made", "made/../made", "link"])
@pytest.mark.parametrize("root", [ROOT, str(ELSEWHERE)])
def test_relocate_refuses_its_own_directory_as_target(
    name: str, root: str, directory: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "link").symlink_to(directory)
    before = contents(directory)
    to = tmp_path / name
    assert cache("relocate", directory, "--target-root", root, "--to", to) == 2
    assert_refused(capsys, f"--to {to} must be another directory: a cache is for one machine")
    assert contents(directory) == before


def test_relocate_skips_damaged_entries_and_exits_with_1(
    made: tuple[KernelCache, Manifest], tmp_path: Path, capsys: Capture
) -> None:
    cache_, manifest = made
    key = min(manifest.entries)
    (cache_.entry(key) / "kernel.cubin").write_bytes(tiny_cubin(b"other"))
    target = tmp_path / "target"
    assert cache("relocate", cache_.root, "--target-root", ELSEWHERE, "--to", target) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        f"changed: {key} kernel.cubin is not what was built",
        placed_line(target, 3, 0),
    ]
    assert captured.err.splitlines()[-1] == "error: 1 entries could not be relocated"


def test_relocate_requires_target_root(directory: Path, tmp_path: Path, capsys: Capture) -> None:
    assert cache("relocate", directory, "--to", tmp_path / "moved") == 2
    assert_refused(capsys, "give --target-root PATH: where deep_gemm is on that machine")


@pytest.mark.parametrize("given", [[], ["--from-root", ROOT], ["--from-cuda", "13.0"]])
def test_relocate_without_manifest_requires_both_origin_options(
    given: list[str], directory: Path, tmp_path: Path, capsys: Capture
) -> None:
    (directory / "manifest.json").unlink()
    target = ["--target-root", ELSEWHERE, "--to", tmp_path / "moved"]
    assert cache("relocate", directory, *target, *given) == 2
    assert_refused(
        capsys,
        f"{directory} has no manifest: say what it was built for with --from-root PATH and "
        "--from-cuda X.Y",
    )


def test_relocate_without_manifest_uses_the_origin_options(
    directory: Path, tmp_path: Path, here: Library, capsys: Capture
) -> None:
    (directory / "manifest.json").unlink()
    target = tmp_path / "target"
    origin = ["--from-root", ROOT, "--from-cuda", "13.0"]
    assert cache("relocate", directory, "--target-root", ELSEWHERE, "--to", target, *origin) == 0
    assert capsys.readouterr().out == placed_line(target, 4, 0) + "\n"
    keys = keys_for(here, ELSEWHERE / "include")
    assert {path.name for path in KernelCache(target).entries()} == {
        keys.cache_key(item.kernel) for item in small_plan().kernels
    }
    assert cache("verify", target, "--target-root", ELSEWHERE) == 0


def test_relocate_with_wrong_from_root_places_nothing(
    made: tuple[KernelCache, Manifest], tmp_path: Path, capsys: Capture
) -> None:
    cache_, manifest = made
    (cache_.root / "manifest.json").unlink()
    origin = ["--from-root", "/srv", "--from-cuda", "13.0"]
    target = ["--target-root", ELSEWHERE, "--to", tmp_path / "target"]
    assert cache("relocate", cache_.root, *target, *origin) == 1
    assert_prints(
        capsys,
        *(
            f"wrong key: {key} is not this source's key for this machine"
            for key in sorted(manifest.entries)
        ),
        placed_line(tmp_path / "target", 0, 0),
        err="error: 4 entries could not be relocated\n",
    )


def test_relocate_into_cache_for_different_machine_places_nothing(
    directory: Path, tmp_path: Path, here: Library, capsys: Capture
) -> None:
    target = tmp_path / "target"
    fill(target, keys_for(here, Path("/opt/third/include")))
    before = contents(target)
    assert cache("relocate", directory, "--target-root", ELSEWHERE, "--to", target) == 2
    assert "was built for another machine" in capsys.readouterr().err
    assert contents(target) == before


def test_relocate_without_installed_library_is_refused(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("runner.target.find_library", lambda wanted: None)
    target = ["--target-root", ELSEWHERE, "--to", tmp_path / "moved"]
    assert cache("relocate", directory, *target) == 2
    assert_refused(capsys, "there is no deep_gemm here")
    assert not (tmp_path / "moved").exists()


def test_relocate_without_nvcc_requires_cuda_version(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("runner.target.find_nvcc", lambda environ: None)
    target = ["--target-root", ELSEWHERE, "--to", tmp_path / "moved"]
    assert cache("relocate", directory, *target) == 2
    assert_refused(capsys, "there is no nvcc here")
    assert not (tmp_path / "moved").exists()
    assert cache("relocate", directory, *target, "--cuda-version", "13.0") == 0
    assert capsys.readouterr().out == placed_line(tmp_path / "moved", 4, 0) + "\n"


def test_relocate_generation_2_cache_to_a_different_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Generation 2 keys hold no install path, so only the compiler can differ."""
    library = second_library(tmp_path / "newer" / "deep_gemm")
    monkeypatch.setattr("runner.target.find_library", lambda wanted: library)
    root = fill(tmp_path / "second", second_keys_for(library))[0].root
    text, target = tmp_path / "nvcc.txt", tmp_path / "target"
    text.write_text(NVCC_TEXT.replace("Aug_20", "Aug_21"))
    assert cache("relocate", root, "--to", target, "--compiler-text", text) == 0
    assert capsys.readouterr().out == (
        f"4 kernels placed in {target} for {library.root} and nvcc 13.0 (Built on "
        "Wed_Aug_21_01:58:59_PM_PDT_2025), 0 already there\n"
    )
    keys = second_keys_for(library, text.read_text())
    assert {path.name for path in KernelCache(target).entries()} == {
        keys.cache_key(item.kernel) for item in small_plan().kernels
    }
    assert cache("verify", target, "--compiler-text", text) == 0
    assert_prints(capsys, f"{target} is whole: checked 4 entries, manifest, this machine")


def test_relocate_says_that_it_waits_for_another_builder(
    directory: Path, tmp_path: Path, capsys: Capture
) -> None:
    target = tmp_path / "target"
    KernelCache(target).prepare()
    command = ["relocate", directory, "--target-root", ELSEWHERE, "--to", target]
    assert_says_waiting(capsys, target, lambda: cache(*command))
    assert len(KernelCache(target).entries()) == 4


def test_relocate_takes_a_list_but_places_kernels_in_one_directory(
    directory: Path, tmp_path: Path, capsys: Capture
) -> None:
    below, target = tmp_path / "below", tmp_path / "target"
    command = ["relocate", f"{directory}:{below}", "--target-root", ELSEWHERE, "--to"]
    assert cache(*command, target) == 0
    assert capsys.readouterr().out == placed_line(target, 4, 0) + "\n"
    for to in (directory, below):
        assert cache(*command, to) == 2
        assert_refused(capsys, f"--to {to} must be another directory: a cache is for one machine")
    both = f"{tmp_path}/c4:{tmp_path}/c5"
    assert cache(*command, both) == 2
    assert_refused(capsys, f"{both} is a list of directories: give the one to write to")
    assert not (tmp_path / "c4").exists()
