"""The stand-in for nvcc, which writes a placeholder cubin and logs its arguments."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runner.standin.build import read_compiles
from tests.unit.standin.fake_torch import VERSION, Child


@pytest.fixture
def environment(child: Child) -> dict[str, str]:
    return child.environment()


def nvcc(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    program = environment["DG_JIT_NVCC_COMPILER"]
    return subprocess.run(
        [program, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_version_is_printed_and_not_logged(child: Child, environment: dict[str, str]) -> None:
    done = nvcc(environment, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, VERSION, "")
    assert read_compiles(child.work) == []


@pytest.mark.parametrize("flags", [["-cubin", "-o"], ["--cubin", "--output-file"]])
def test_compile_writes_output_and_logs_arguments(
    child: Child, environment: dict[str, str], tmp_path: Path, flags: list[str]
) -> None:
    out = tmp_path / "kernel.cubin"
    arguments = [
        "kernel.cu",
        flags[0],
        flags[1],
        str(out),
        "-O3",
        "--compiler-options=-O3,two words",
    ]
    done = nvcc(environment, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert out.read_bytes()
    assert read_compiles(child.work) == [arguments]


def test_concurrent_compiles_are_all_logged(
    child: Child, environment: dict[str, str], tmp_path: Path
) -> None:
    long = "-I" + "x" * 9000

    def compile_one(index: int) -> int:
        return nvcc(
            environment, "-cubin", f"{index}.cu", "-o", str(tmp_path / str(index)), long
        ).returncode

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(compile_one, range(60))) == {0}
    compiles = read_compiles(child.work)
    assert sorted(source for _, source, *_ in compiles) == sorted(f"{i}.cu" for i in range(60))
    assert {last for *_, last in compiles} == {long}


def test_unsupported_arguments_are_refused_and_not_logged(
    child: Child, environment: dict[str, str], tmp_path: Path
) -> None:
    done = nvcc(environment, "kernel.cu", "-cubin")
    missing = "stand-in nvcc: compiles to a file: missing -o or --output-file\n"
    assert (done.returncode, done.stderr) == (1, missing)
    done = nvcc(environment, "kernel.cu", "--dryrun", "-o", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (1, "stand-in nvcc: has no stages for --dryrun\n")
    assert not (tmp_path / "out").exists()
    done = nvcc(environment, "kernel.cu", "-o", str(tmp_path / "none" / "out"))
    assert done.returncode == 1 and "cannot write" in done.stderr
    assert read_compiles(child.work) == []
