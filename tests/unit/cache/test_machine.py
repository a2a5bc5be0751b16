"""Differences between a machine and the one a cache was built for, as messages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.cache.machine import Device, TargetMachine, compiler_words
from runner.cache.manifest import Entry, Manifest
from runner.config.environ import Environ
from runner.kernels.installed import Library
from runner.kernels.keys import CacheKeys, Recipe, first_recipe
from tests.unit.small_cache import (
    INCLUDE,
    NVCC_TEXT,
    keys_for,
    manifest_for,
    second_keys_for,
    second_library,
)

ROOT = INCLUDE.parent
H200 = Device((9, 0), 132)
FLAGS = (
    "-std=c++20 --diag-suppress=39,161 --ptxas-options=--register-usage-level=10 "
    "--gpu-architecture=sm_90a -O3"
)
VARIABLES_DIFFER = (
    "DG_JIT_* variables differ; set them as they were at build time, or rebuild the cache with them"
)


@pytest.fixture
def built(keys: CacheKeys) -> Manifest:
    return replace(manifest_for(keys), gpu="h200", num_sms=132)


@pytest.fixture
def there(here: Library) -> TargetMachine:
    """The machine that ``built`` was built for."""
    return TargetMachine(here, ROOT, "NVCC13.0", Environ(), H200)


@pytest.fixture
def newer(tmp_path: Path) -> Library:
    return second_library(tmp_path / "newer_gemm")


@pytest.fixture
def second(newer: Library) -> Manifest:
    return replace(manifest_for(second_keys_for(newer)), gpu="h200", num_sms=132)


@pytest.fixture
def second_there(newer: Library) -> TargetMachine:
    return TargetMachine(newer, newer.root, NVCC_TEXT, Environ(), H200)


def differences(machine: TargetMachine, built: Manifest) -> list[str]:
    return list(machine.differences(built))


def test_same_machine_has_no_differences(
    built: Manifest, there: TargetMachine, second: Manifest, second_there: TargetMachine
) -> None:
    assert differences(there, built) == []
    assert differences(second_there, second) == []
    assert differences(replace(there, device=None), built) == []
    assert differences(replace(there, version_text=NVCC_TEXT), built) == [], (
        "generation 1 keys hold only nvcc's release"
    )


def test_different_library_hides_all_other_differences(
    built: Manifest, there: TargetMachine
) -> None:
    other = replace(
        there,
        library=Library(there.library.root, "vllm", "0.33.0"),
        version_text="NVCC13.1",
        root=Path("/x"),
        device=Device((10, 0), 148),
    )
    assert differences(other, built) == [
        "other library: built for sgl-deep-gemm 0.1.4.post1, but vllm 0.33.0 needs other "
        "kernels: build for that one (runner compile --library)"
    ]


def test_different_nvcc_release_is_reported(built: Manifest, there: TargetMachine) -> None:
    assert differences(replace(there, version_text="NVCC13.1"), built) == [
        "other compiler: built for nvcc 13.0, here it is nvcc 13.1: runner cache relocate, or "
        "build for the nvcc there (runner compile --compiler-text)"
    ]


def test_different_nvcc_build_of_same_release_is_reported_for_generation_2(
    second: Manifest, second_there: TargetMachine
) -> None:
    text = NVCC_TEXT.replace("Built on Wed_Aug_20_01:58:59_PM_PDT_2025\n", "")
    assert differences(replace(second_there, version_text=text), second) == [
        "other compiler: built for nvcc 13.0 (Built on Wed_Aug_20_01:58:59_PM_PDT_2025), here it "
        "is nvcc 13.0: runner cache relocate, or build for the nvcc there "
        "(runner compile --compiler-text)"
    ]


def test_different_install_path_is_reported_for_generation_1_only(
    built: Manifest, there: TargetMachine, second: Manifest, second_there: TargetMachine
) -> None:
    assert differences(replace(there, root=Path("/opt/dg")), built) == [
        f"other install path: built for {INCLUDE}, here it is /opt/dg/include: runner cache "
        "relocate --target-root"
    ]
    assert differences(replace(second_there, root=Path("/opt/dg")), second) == []


@pytest.mark.parametrize(
    ("variables", "changed"),
    [
        ({"dg_jit_cpp_standard": 17}, "-std=c++17, -std=c++20"),
        ({"dg_jit_ptxas_check": 1}, "--ptxas-options=--verbose,--warn-on-local-memory-usage"),
        ({"dg_jit_with_lineinfo": 1}, "-Xcompiler, -lineinfo, -rdynamic"),
    ],
)
def test_flags_changed_by_environment_are_reported_for_generation_1(
    variables: dict[str, int], changed: str, built: Manifest, there: TargetMachine
) -> None:
    line = f"other compiler flags ({changed}): {VARIABLES_DIFFER}"
    assert differences(replace(there, environ=Environ(**variables)), built) == [line]  # type: ignore[arg-type]
    flags = " ".join(first_recipe(Environ(**variables)).arguments(INCLUDE))  # type: ignore[arg-type]
    other_way = replace(built, flags=flags)
    assert differences(there, other_way) == [line]
    assert differences(replace(there, environ=Environ(**variables)), other_way) == []  # type: ignore[arg-type]


P = "--ptxas-options="
LEVEL = f"{P}--register-usage-level=10"


@pytest.mark.parametrize(
    ("variables", "standard", "around", "changed"),
    [
        ({}, 20, LEVEL, None),
        ({"dg_jit_cpp_standard": 17}, 17, LEVEL, "-std=c++17, -std=c++20"),
        ({"dg_jit_ptxas_verbose": 1}, 20, f"{P}--verbose {LEVEL}", f"{P}--verbose"),
        ({"dg_jit_check_no_spills": 1}, 20, f"{LEVEL} {P}--warn-on-spills", f"{P}--warn-on-spills"),
        (
            {"dg_jit_check_no_local_memory": 1},
            20,
            f"{LEVEL} {P}--warn-on-local-memory-usage",
            f"{P}--warn-on-local-memory-usage",
        ),
        ({"dg_jit_with_lineinfo": 1}, 20, f"{LEVEL} --generate-line-info", "--generate-line-info"),
        (
            {"dg_jit_debug": 1},
            20,
            f"{P}--verbose {LEVEL} --generate-line-info",
            f"--generate-line-info, {P}--verbose",
        ),
        (
            {"dg_jit_debug": 1, "dg_jit_check_no_spills": 1, "dg_jit_check_no_local_memory": 1},
            20,
            f"{P}--verbose {LEVEL} {P}--warn-on-spills {P}--warn-on-local-memory-usage "
            "--generate-line-info",
            f"--generate-line-info, {P}--verbose, {P}--warn-on-local-memory-usage, "
            f"{P}--warn-on-spills",
        ),
    ],
)
def test_flags_changed_by_environment_are_reported_for_generation_2(
    variables: dict[str, Any],
    standard: int,
    around: str,
    changed: str | None,
    second: Manifest,
    second_there: TargetMachine,
) -> None:
    """A recipe for this machine undoes the flag changes of the machine that built the cache."""
    environ = Environ(**variables)
    assert second.flags == FLAGS
    flags = FLAGS.replace(LEVEL, around).replace("c++20", f"c++{standard}")
    machine = replace(second_there, environ=environ)
    assert machine.recipe(second) == Recipe(2, tuple(flags.split(" ")), "deep-gemm")
    line = f"other compiler flags ({changed}): {VARIABLES_DIFFER}"
    expected = [] if changed is None else [line]
    other_way = replace(second, flags=flags)
    assert differences(machine, second) == expected
    assert differences(second_there, other_way) == expected
    assert differences(machine, other_way) == []
    assert second_there.recipe(other_way).flags == tuple(FLAGS.split(" "))


def test_recipe_for_non_sm90_gpu_takes_flags_from_the_manifest(
    built: Manifest, there: TargetMachine
) -> None:
    """For generation 1, this project knows the flags of SM90 only."""
    flags = f"-std=c++20 {LEVEL} -I{INCLUDE} --gpu-architecture=sm_100f"
    blackwell = replace(built, arch="sm_100f", flags=flags, gpu="b200", num_sms=148)
    machine = replace(there, device=Device((10, 0), 148))
    assert machine.recipe(blackwell) == Recipe(
        1, ("-std=c++20", LEVEL, "-I{include}", "--gpu-architecture=sm_100f")
    )
    assert differences(machine, blackwell) == []
    assert differences(replace(machine, root=Path("/opt/dg")), blackwell) == [
        f"other install path: built for {INCLUDE}, here it is /opt/dg/include: runner cache "
        "relocate --target-root"
    ]
    changed = "-Xcompiler, -lineinfo, -rdynamic"
    assert differences(replace(machine, environ=Environ(dg_jit_with_lineinfo=1)), blackwell) == [
        f"other compiler flags ({changed}): {VARIABLES_DIFFER}"
    ]


def test_install_path_with_spaces_is_compared_correctly(here: Library) -> None:
    """The include path is a single flag, even if it contains spaces."""
    root = Path("/my libs/deep_gemm")
    built = manifest_for(keys_for(here, root / "include"))
    assert differences(TargetMachine(here, root, "NVCC13.0", Environ()), built) == []
    elsewhere = TargetMachine(here, ROOT, "NVCC13.0", Environ())
    assert elsewhere.changed_flags(built) == []
    assert differences(elsewhere, built) == [
        f"other install path: built for /my libs/deep_gemm/include, here it is {INCLUDE}: runner "
        "cache relocate --target-root"
    ]


def test_different_compute_capability_is_reported(built: Manifest, there: TargetMachine) -> None:
    assert differences(replace(there, device=Device((10, 0), 148)), built) == [
        "other GPU: built for h200 (9.0), this one has compute capability 10.0: runner compile "
        "--gpu"
    ]


def test_different_sm_count_is_reported_unless_entries_cover_it(
    built: Manifest, there: TargetMachine
) -> None:
    h20 = replace(there, device=Device((9, 0), 78))
    line = "other GPU: built for 132 SMs, this one has 78: runner compile --gpu or --num-sms"
    assert differences(h20, built) == [line]
    assert differences(h20, replace(built, gpu="")) == [line]
    assert differences(h20, replace(built, gpu="", num_sms=0)) == [], "an older manifest"
    use = {"num_sms": 78}
    both = replace(built, entries={"a": Entry("a", [use], "", "", 0)})
    assert differences(h20, both) == []
    assert differences(there, both) == []


@pytest.mark.parametrize("variable", ["use_nvrtc", "dg_jit_use_nvrtc"])
def test_nvrtc_variable_is_reported(variable: str, built: Manifest, there: TargetMachine) -> None:
    environ = Environ(**{variable: True})  # type: ignore[arg-type]
    assert differences(replace(there, environ=environ), built) == [
        "other compiler: DG_JIT_USE_NVRTC is set, but nvcc built these entries: unset it where "
        "the server runs"
    ]


def test_all_differences_are_reported_together(built: Manifest, there: TargetMachine) -> None:
    other = replace(
        there,
        root=Path("/opt/dg"),
        version_text="NVCC12.9",
        device=Device((9, 0), 78),
        environ=Environ(dg_jit_cpp_standard=17),
    )
    assert [line.partition(":")[0].partition(" (")[0] for line in differences(other, built)] == [
        "other compiler",
        "other install path",
        "other compiler flags",
        "other GPU",
    ]


@pytest.mark.parametrize(
    ("signature", "words"),
    [
        ("NVCC13.0", "nvcc 13.0"),
        ("NVCC12.10", "nvcc 12.10"),
        (NVCC_TEXT, "nvcc 13.0 (Built on Wed_Aug_20_01:58:59_PM_PDT_2025)"),
    ],
)
def test_compiler_words_shortens_nvcc_version_text(signature: str, words: str) -> None:
    assert compiler_words(signature) == words
