"""The CUDA toolkit of an nvcc, and the Python of a library."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from runner.kernels.installed import Library
from runner.kernels.nvcc import toolkit_of


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_toolkit_is_the_one_that_nvcc_names(tmp_path: Path) -> None:
    (tmp_path / "cuda-13" / "bin").mkdir(parents=True)
    words = f"#$ _NVVM_BRANCH_=nvvm\\n#$ TOP={tmp_path}/cuda-13/bin/..\\n#$ PATH=x\\n"
    nvcc = script(tmp_path / "usr" / "bin" / "nvcc", f"printf '{words}' >&2")
    assert toolkit_of(nvcc) == tmp_path / "cuda-13"


def test_nvcc_is_asked_without_compiling(tmp_path: Path) -> None:
    nvcc = script(tmp_path / "bin" / "nvcc", f'echo "$@" > {tmp_path}/asked')
    toolkit_of(nvcc)
    assert (tmp_path / "asked").read_text().split() == ["--dryrun", "-E", "-x", "cu", "/dev/null"]


@pytest.mark.parametrize("text", ["exit 1", "echo '#$ TOP=/printed/elsewhere'", "echo no >&2"])
def test_toolkit_of_an_nvcc_that_names_none_is_above_its_folder(text: str, tmp_path: Path) -> None:
    nvcc = script(tmp_path / "cuda" / "bin" / "nvcc", text)
    assert toolkit_of(nvcc) == tmp_path / "cuda"
    link = tmp_path / "link"
    link.symlink_to(nvcc)
    assert toolkit_of(link) == tmp_path / "cuda"


def test_toolkit_of_a_missing_nvcc_is_above_its_folder(tmp_path: Path) -> None:
    assert toolkit_of(tmp_path / "cuda" / "bin" / "nvcc") == tmp_path / "cuda"


@pytest.mark.parametrize("below", ["deep_gemm", "vllm/third_party/deep_gemm"])
@pytest.mark.parametrize("packages", ["site-packages", "dist-packages"])
def test_python_of_a_library_is_that_of_its_environment(
    packages: str, below: str, tmp_path: Path
) -> None:
    python = script(tmp_path / "env" / "bin" / "python", "")
    root = tmp_path / "env" / "lib" / "python3.12" / packages / below
    assert Library(root).python == python


@pytest.mark.parametrize(
    "root",
    [
        "/nowhere/lib/python3.12/site-packages/deep_gemm",
        "/src/DeepGEMM/deep_gemm",
        "/opt/site-packages/deep_gemm",
        "/site-packages/deep_gemm",
        f"{sys.prefix}/lib/python3.12/site-packages/deep_gemm",
    ],
)
def test_python_of_any_other_library_is_this_one(root: str) -> None:
    assert Library(Path(root)).python == Path(sys.executable)
