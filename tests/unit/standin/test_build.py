"""Building the stand-in GPU library, and the environment of a process that uses it."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runner.errors import UserError
from runner.standin import build
from runner.standin.build import LIBRARY, NVCC, PREFIX, build_standin
from runner.standin.gpus import gpu_named
from tests.unit.standin.fake_torch import COMPILER, LIBRARIES, VERSION, Child, needs_compiler

pytestmark = needs_compiler


@pytest.fixture
def libraries(packages: Path) -> list[Path]:
    return [packages / "nvidia" / "cu13" / "lib" / name for name in LIBRARIES]


@pytest.fixture
def compiler(tmp_path: Path) -> Callable[[str], str]:
    """Makes a C compiler that first runs the given shell script."""

    def make(script: str) -> str:
        path = tmp_path / "compiler"
        path.write_text(f'#!/bin/sh\n{script}\nexec {COMPILER} "$@"\n')
        path.chmod(0o755)
        return str(path)

    return make


def environment(cache: Path, **more: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(cache), **more}


def test_standin_is_compiled_once_and_then_reused(
    libraries: list[Path], tmp_path: Path, compiler: Callable[[str], str]
) -> None:
    calls = tmp_path / "calls"
    variables = environment(tmp_path, CC=compiler(f'echo "$*" >> {calls}'))
    root = build_standin(libraries, variables)
    assert root.parent == tmp_path / "deepgemm-coldstart" / "standin"
    assert (root / LIBRARY).is_file() and os.access(root / NVCC, os.X_OK)
    assert (root / "lib" / "libnvidia-ml.so.1").resolve() == root / LIBRARY
    compiles = [line for line in calls.read_text().splitlines() if line != "--version"]
    assert len(compiles) == 2
    assert build_standin(libraries, variables) == root
    assert [line for line in calls.read_text().splitlines() if line != "--version"] == compiles
    assert list(root.parent.iterdir()) == [root]


def test_standin_is_rebuilt_if_libraries_or_sources_change(
    libraries: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = environment(tmp_path)
    first = build_standin(libraries, variables)
    assert build_standin(libraries[:1], variables) != first
    copied = tmp_path / "native"
    shutil.copytree(build._NATIVE, copied)
    monkeypatch.setattr(build, "_NATIVE", copied)
    assert build_standin(libraries, variables) == first
    with (copied / "blas.c").open("a") as file:
        file.write("// more\n")
    assert build_standin(libraries, variables) != first


def test_concurrent_builds_leave_one_result(libraries: list[Path], tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        roots = set(pool.map(lambda _: build_standin(libraries, environment(tmp_path)), range(4)))
    (root,) = roots
    assert list(root.parent.iterdir()) == [root]


def test_standin_compiles_without_warnings(libraries: list[Path], tmp_path: Path) -> None:
    assert build_standin(libraries, environment(tmp_path, CC=f"{COMPILER} -Wall -Werror"))


def test_missing_or_invalid_c_compiler_is_refused(libraries: list[Path], tmp_path: Path) -> None:
    for variables, words in (
        ({"PATH": str(tmp_path)}, "the stand-in GPU needs a C compiler: apt-get install gcc"),
        ({"CC": "nocc"}, "CC=nocc is not a program: unset CC or set it to a C compiler"),
        ({"CC": "'gcc"}, "CC='gcc is not a command (No closing quotation): unset CC"),
    ):
        with pytest.raises(UserError) as caught:
            build_standin(libraries, environment(tmp_path, **variables))
        assert str(caught.value) == words


def test_failed_c_compile_is_reported_and_leaves_nothing(
    libraries: list[Path], tmp_path: Path, compiler: Callable[[str], str]
) -> None:
    variables = environment(tmp_path, CC=compiler("echo 'no room' >&2; exit 4"))
    with pytest.raises(UserError, match=r"compiler cannot build the stand-in GPU: no room$"):
        build_standin(libraries, variables)
    assert list((tmp_path / "deepgemm-coldstart" / "standin").iterdir()) == []


def test_unusable_cache_folder_is_refused(libraries: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/deepgemm-coldstart/standin: Not a"):
        build_standin(libraries, environment(tmp_path / "file"))
    with pytest.raises(UserError, match=r"has a space or colon.*: set XDG_CACHE_HOME"):
        build_standin(libraries, environment(tmp_path / "two words"))


def test_child_environment_selects_gpu_library_and_nvcc(child: Child, tmp_path: Path) -> None:
    found = child.environment(
        gpu_named("h20", 60),
        devices=3,
        LD_PRELOAD="/a.so",
        LD_LIBRARY_PATH="/b",
        KEPT="yes",
        DG_JIT_USE_NVRTC="1",
        CUDA_HOME=str(tmp_path / "none"),
    )
    root = Path(found["CUDA_HOME"])
    assert found["LD_PRELOAD"] == f"{root / LIBRARY}:/a.so"
    assert found["LD_LIBRARY_PATH"] == f"{root / 'lib'}:/b"
    assert found["DG_JIT_NVCC_COMPILER"] == str(root / NVCC)
    assert (found["DG_JIT_USE_NVRTC"], found["KEPT"]) == ("0", "yes")
    assert Path(found[PREFIX + "VERSION_FILE"]).read_text() == VERSION
    names = ("NAME", "MAJOR", "MINOR", "SMS", "DEVICES", "CUDA_VERSION")
    values = ("NVIDIA H20", "9", "0", "60", "3", "13000")
    assert tuple(found[PREFIX + name] for name in names) == values


def test_existing_cuda_home_or_cuda_path_is_kept(child: Child, tmp_path: Path) -> None:
    assert child.environment(CUDA_HOME=str(tmp_path))["CUDA_HOME"] == str(tmp_path)
    kept = child.environment(CUDA_HOME="", CUDA_PATH=str(tmp_path))
    assert (kept["CUDA_HOME"], kept["CUDA_PATH"]) == ("", str(tmp_path))
