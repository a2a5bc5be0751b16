"""``runner cache verify``: reported problems, and invalid targets."""

import json
from pathlib import Path

import pytest

from runner.cache.kernel_cache import KernelCache
from runner.cache.machine import Device
from runner.cache.manifest import Manifest
from runner.kernels.installed import Library
from tests.unit.cache_cli import (
    ELSEWHERE,
    ROOT,
    Capture,
    assert_prints,
    assert_refused,
    cache,
    plan_file,
)
from tests.unit.elf import tiny_cubin
from tests.unit.kept_cache import change, first_of, remove
from tests.unit.small_cache import NVCC_TEXT, contents, fill, second_keys_for, second_library

pytestmark = pytest.mark.usefixtures("here")


def path_line(root: str | Path) -> str:
    return (
        f"other install path: built for {ROOT}/include, here it is {root}/include: runner cache "
        "relocate --target-root"
    )


AGAIN = "a server here would compile all of it again"


def test_verify_of_intact_cache_says_what_was_checked(
    directory: Path, tmp_path: Path, here: Library, capsys: Capture
) -> None:
    before = contents(directory)
    plan = plan_file(tmp_path / "plan.json", here)
    right = ["--target-root", ROOT]
    assert cache("verify", directory, *right) == 0
    assert_prints(capsys, f"{directory} is whole: checked 4 entries, manifest, this machine")
    assert cache("verify", directory, "--plan", plan, *right) == 0
    assert_prints(capsys, f"{directory} is whole: checked 4 entries, manifest, plan, this machine")
    (directory / "manifest.json").unlink()
    assert cache("verify", directory, "--plan", plan, *right) == 0
    assert_prints(capsys, f"{directory} is whole: checked 4 entries, plan, this machine")
    assert cache("verify", directory, *right) == 0
    assert_prints(capsys, f"{directory} is whole: checked 4 entries, this machine")
    del before["manifest.json"]
    assert contents(directory) == before


def test_verify_defaults_to_this_machines_install_path(
    directory: Path, tmp_path: Path, here: Library, capsys: Capture
) -> None:
    plan = plan_file(tmp_path / "plan.json", here)
    for words in ([], ["--plan", plan]):
        assert cache("verify", directory, *words) == 1
        assert_prints(capsys, path_line(here.root), err=f"error: {directory}: {AGAIN}\n")
    (directory / "manifest.json").unlink()
    assert cache("verify", directory, "--plan", plan) == 1
    assert_prints(capsys, path_line(here.root), err=f"error: {directory}: {AGAIN}\n")


def test_verify_without_manifest_and_plan_reports_wrong_keys(
    made: tuple[KernelCache, Manifest], capsys: Capture
) -> None:
    cache_, manifest = made
    (cache_.root / "manifest.json").unlink()
    assert cache("verify", cache_.root) == 1
    assert_prints(
        capsys,
        *(
            f"wrong key: {key} is not this source's key for this machine"
            for key in sorted(manifest.entries)
        ),
        err=f"error: {cache_.root}: 4 wrong key\n",
    )


@pytest.mark.parametrize(
    ("missing", "words"),
    [("find_library", "there is no deep_gemm here"), ("find_nvcc", "there is no nvcc here")],
)
def test_verify_fails_without_library_or_nvcc(
    missing: str, words: str, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(f"runner.target.{missing}", lambda _: None)
    assert cache("verify", directory, "--target-root", ROOT) == 1
    assert_prints(
        capsys,
        f"{directory} is whole: checked 4 entries, manifest",
        err=f"error: cannot tell whether a server here would hit this cache: {words}\n",
    )


def test_verify_names_problems_without_installed_library(
    made: tuple[KernelCache, Manifest], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("runner.target.find_library", lambda wanted: None)
    key, path = first_of(made)
    change(path)
    assert cache("verify", made[0].root) == 1
    assert_prints(
        capsys,
        f"changed: {key} kernel.cubin is not what was built",
        err=f"error: {made[0].root}: 1 changed\n",
    )


def test_verify_with_cuda_version_needs_no_nvcc(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("runner.target.find_nvcc", lambda environ: None)
    right = ["--target-root", ROOT, "--cuda-version", "13.0"]
    assert cache("verify", directory, *right) == 0
    assert_prints(capsys, f"{directory} is whole: checked 4 entries, manifest, this machine")


def test_verify_reads_nvcc_version_from_compiler_text_file(
    directory: Path, tmp_path: Path, capsys: Capture
) -> None:
    text = tmp_path / "nvcc.txt"
    right = ["--target-root", ROOT, "--compiler-text", text]
    text.write_text(NVCC_TEXT)
    assert cache("verify", directory, *right) == 0
    assert_prints(capsys, f"{directory} is whole: checked 4 entries, manifest, this machine")
    text.write_text(NVCC_TEXT.replace("release 13.0", "release 13.1"))
    assert cache("verify", directory, *right) == 1
    assert_prints(capsys, compiler_line("13.1"), err=f"error: {directory}: {AGAIN}\n")
    for wrong, shown in (("gcc 14", "gcc 14"), ("line\n" * 99, r"line\n" * 8 + "...")):
        text.write_text(wrong)
        assert cache("verify", directory, *right) == 2
        assert_refused(
            capsys,
            f"--compiler-text {text}: the compiler's version text '{shown}' has no CUDA release, "
            "such as NVCC13.0 or 'release 13.0'",
        )
    text.write_text(NVCC_TEXT.replace("release 13.0", "release 12.4"))
    assert cache("verify", directory, *right) == 2
    assert_refused(
        capsys, f"release 12.4 of --compiler-text {text} is too old: 12.9 or newer is needed"
    )
    text.write_text(NVCC_TEXT)
    assert cache("verify", directory, *right, "--cuda-version", "13.0") == 2
    assert_refused(capsys, "--compiler-text and --cuda-version both name the compiler: give one")


def compiler_line(release: str) -> str:
    return (
        f"other compiler: built for nvcc 13.0, here it is nvcc {release}: runner cache relocate, "
        "or build for the nvcc there (runner compile --compiler-text)"
    )


def test_verify_reports_flags_changed_by_environment(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("DG_JIT_CPP_STANDARD", "17")
    assert cache("verify", directory, "--target-root", ROOT) == 1
    assert_prints(
        capsys,
        "other compiler flags (-std=c++17, -std=c++20): DG_JIT_* variables differ; set them as "
        "they were at build time, or rebuild the cache with them",
        err=f"error: {directory}: {AGAIN}\n",
    )


@pytest.fixture
def newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """A library of JIT generation 2 in place of the installed one."""
    library = second_library(tmp_path / "newer" / "deep_gemm")
    monkeypatch.setattr("runner.target.find_library", lambda wanted: library)
    return library


@pytest.fixture
def nvcc_text(tmp_path: Path) -> Path:
    (tmp_path / "nvcc.txt").write_text(NVCC_TEXT)
    return tmp_path / "nvcc.txt"


def test_verify_of_generation_2_cache_compares_full_nvcc_version(
    newer: Library, nvcc_text: Path, tmp_path: Path, capsys: Capture
) -> None:
    root = fill(tmp_path / "second", second_keys_for(newer))[0].root
    assert cache("verify", root, "--compiler-text", nvcc_text) == 0
    assert_prints(capsys, f"{root} is whole: checked 4 entries, manifest, this machine")
    assert cache("verify", root, "--compiler-text", nvcc_text, "--target-root", ELSEWHERE) == 0
    assert_prints(capsys, f"{root} is whole: checked 4 entries, manifest, this machine")
    nvcc_text.write_text(NVCC_TEXT.replace("Aug_20", "Aug_21"))
    assert cache("verify", root, "--compiler-text", nvcc_text) == 1
    assert_prints(
        capsys,
        "other compiler: built for nvcc 13.0 (Built on Wed_Aug_20_01:58:59_PM_PDT_2025), here it "
        "is nvcc 13.0 (Built on Wed_Aug_21_01:58:59_PM_PDT_2025): runner cache relocate, or build "
        "for the nvcc there (runner compile --compiler-text)",
        err=f"error: {root}: {AGAIN}\n",
    )
    assert cache("verify", root, "--cuda-version", "13.1") == 2
    assert_refused(
        capsys,
        "--cuda-version 13.1 is not enough: this library's keys include all that nvcc --version "
        "prints there; give it with --compiler-text FILE",
    )


def test_verify_names_every_problem(made: tuple[KernelCache, Manifest], capsys: Capture) -> None:
    cache_, manifest = made
    missing, half, changed, _ = sorted(manifest.entries)
    remove(cache_.entry(missing))
    (cache_.entry(half) / "kernel.cubin").unlink()
    (cache_.entry(changed) / "kernel.cubin").write_bytes(tiny_cubin(b"other"))
    cache_.entry("notes.txt").write_text("")
    assert cache("verify", cache_.root, "--target-root", ROOT) == 1
    assert_prints(
        capsys,
        f"missing: {missing} is not in the cache",
        f"truncated: {half} kernel.cubin is missing: the library aborts on this entry",
        f"changed: {changed} kernel.cubin is not what was built",
        "foreign: notes.txt is not a kernel's folder",
        err=f"error: {cache_.root}: 1 missing, 1 truncated, 1 changed, 1 foreign\n",
    )


def test_verify_shows_the_first_twenty(directory: Path, capsys: Capture) -> None:
    for number in range(23):
        (directory / "cache" / f"note{number:02}").write_text("")
    assert cache("verify", directory, "--target-root", ROOT) == 1
    assert_prints(
        capsys,
        *(f"foreign: note{number:02} is not a kernel's folder" for number in range(20)),
        "... and 3 more",
        err=f"error: {directory}: 23 foreign\n",
    )


@pytest.mark.parametrize(
    ("target", "lines"),
    [
        (["--target-root", str(ELSEWHERE)], [path_line(ELSEWHERE)]),
        (["--target-root", ROOT, "--cuda-version", "13.1"], [compiler_line("13.1")]),
        (
            ["--target-root", str(ELSEWHERE), "--cuda-version", "12.9"],
            [compiler_line("12.9"), path_line(ELSEWHERE)],
        ),
    ],
    ids=["path", "compiler", "both"],
)
def test_verify_for_different_machine_names_the_differences(
    target: list[str], lines: list[str], directory: Path, capsys: Capture
) -> None:
    assert cache("verify", directory, *target) == 1
    assert_prints(capsys, *lines, err=f"error: {directory}: {AGAIN}\n")


def test_verify_for_different_machine_also_names_damage(
    made: tuple[KernelCache, Manifest], capsys: Capture
) -> None:
    key, path = first_of(made)
    change(path)
    assert cache("verify", made[0].root, "--target-root", ELSEWHERE) == 1
    assert_prints(
        capsys,
        path_line(ELSEWHERE),
        f"changed: {key} kernel.cubin is not what was built",
        err=f"error: {made[0].root}: 1 changed, {AGAIN}\n",
    )


def test_verify_names_kernels_missing_from_a_plan(
    made: tuple[KernelCache, Manifest], tmp_path: Path, here: Library, capsys: Capture
) -> None:
    cache_, manifest = made
    (cache_.root / "manifest.json").unlink()
    lacking = sorted(manifest.entries)[0]
    remove(cache_.entry(lacking))
    plan = plan_file(tmp_path / "plan.json", here)
    assert cache("verify", cache_.root, "--plan", plan, "--target-root", ROOT) == 1
    assert_prints(
        capsys, f"missing: {lacking} is not in the cache", err=f"error: {cache_.root}: 1 missing\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cuda-version", "13"], "--cuda-version '13' must be X.Y, such as 13.0"),
        (
            ["--target-root", "here"],
            "--target-root here must be an absolute path: it is part of the key",
        ),
        (["--cuda-version", "11.8"], "--cuda-version 11.8 is too old: 12.9 or newer is needed"),
    ],
)
def test_verify_and_relocate_refuse_invalid_targets(
    arguments: list[str], words: str, directory: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = contents(directory)
    assert cache("verify", directory, *arguments) == 2
    assert_refused(capsys, words)
    root = [] if "--target-root" in arguments else ["--target-root", ROOT]
    assert cache("relocate", directory, "--to", tmp_path / "moved", *root, *arguments) == 2
    assert_refused(capsys, words)
    assert not (tmp_path / "moved").exists()
    assert contents(directory) == before


def test_verify_of_empty_cache_fails(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty" / "cache").mkdir(parents=True)
    assert cache("verify", tmp_path / "empty") == 1
    assert_prints(capsys, err=f"error: {tmp_path / 'empty'} holds no entries\n")


def test_verify_of_generation_2_cache_needs_a_manifest(
    newer: Library, tmp_path: Path, capsys: Capture
) -> None:
    root = fill(tmp_path / "second", second_keys_for(newer))[0].root
    (root / "manifest.json").unlink()
    assert cache("verify", root) == 1
    assert_prints(
        capsys,
        f"{root} is whole: checked 4 entries, this machine",
        err="error: cannot tell whether a server here would hit this cache: there is no manifest, "
        "and this library's keys cannot be computed without one\n",
    )


def test_verify_checks_gpu_option_or_this_machines_gpu(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    right = [directory, "--target-root", ROOT]
    change_manifest(directory, gpu="h200", num_sms=132)
    assert cache("verify", *right) == 0
    whole = f"{directory} is whole for h200 (132 SMs): checked 4 entries, manifest, this machine"
    assert_prints(capsys, whole)
    assert cache("verify", *right, "--gpu", "h100") == 0
    assert_prints(capsys, f"{whole}, GPU")
    other = "other GPU: built for h200 (9.0), this one has compute capability 10.0: runner compile"
    assert cache("verify", *right, "--gpu", "b200") == 1
    assert_prints(capsys, f"{other} --gpu", err=f"error: {directory}: {AGAIN}\n")
    monkeypatch.setattr("runner.target.device_here", lambda: Device((10, 0), 148))
    assert cache("verify", *right) == 1
    assert_prints(capsys, f"{other} --gpu", err=f"error: {directory}: {AGAIN}\n")


def change_manifest(directory: Path, **values: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
