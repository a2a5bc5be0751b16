"""Finding the CUDA libraries of an interpreter's torch."""

import json
import os
import sys
from pathlib import Path

import pytest

from runner.errors import UserError
from runner.standin import cuda_libraries
from runner.standin.cuda_libraries import find_cuda_libraries
from tests.unit.standin.fake_torch import make_packages


def interpreter(
    folder: Path, *, torch: Path | None, cuda: str | None = "13.0", nvidia: Path | None = None
) -> Path:
    """A program that gives the answers of a Python with these packages."""
    packages = [[str(path)] if path else [] for path in (torch, nvidia)]
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho '{json.dumps([cuda, *packages, str(folder)])}'\n")
    path.chmod(0o755)
    return path


def test_cuda_libraries_are_found_in_wheels(packages: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    folder = packages / "nvidia" / "cu13" / "lib"
    names = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13")
    found = find_cuda_libraries(Path(sys.executable), environment)
    assert found == (13000, [folder / name for name in names])


@pytest.mark.parametrize("cuda", [None, "12.8"])
def test_cuda_version_is_read_without_importing_torch(tmp_path: Path, cuda: str | None) -> None:
    packages = make_packages(tmp_path / "site", cuda=cuda, libraries=False)
    words = f"is built for CUDA {cuda}: " if cuda else "is built without CUDA: "
    with pytest.raises(UserError, match=words):
        find_cuda_libraries(Path(sys.executable), {**os.environ, "PYTHONPATH": str(packages)})


@pytest.mark.parametrize("place", ["torch/lib", "lib", "searched", "home/lib64"])
def test_cuda_libraries_are_found_outside_wheels(tmp_path: Path, place: str) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    (folder / "libcudart.so.13").touch()
    python = interpreter(tmp_path, torch=tmp_path / "torch", cuda="13.2")
    environment = {
        "LD_LIBRARY_PATH": f":{tmp_path / 'searched'}",
        "CUDA_HOME": str(tmp_path / "home"),
    }
    version, paths = find_cuda_libraries(python, environment)
    assert (version, paths[0]) == (13020, folder / "libcudart.so.13")


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        (
            None,
            "torch of {python} is built without CUDA: install one with CUDA, or give a library "
            "whose tables ship with this tool (--library sgl-deep-gemm==0.2.5)",
        ),
        (
            "12.8",
            "torch of {python} is built for CUDA 12.8: the stand-in GPU supports only CUDA 13",
        ),
        (
            "13.0",
            "{python} has torch, but no libcudart.so.13: install nvidia-cuda-runtime",
        ),
    ],
)
def test_unsupported_torch_or_missing_cudart_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, message: str
) -> None:
    python = interpreter(tmp_path, torch=tmp_path / "torch", cuda=cuda, nvidia=tmp_path)
    monkeypatch.setattr(cuda_libraries, "_TOOLKIT", tmp_path / "none")
    with pytest.raises(UserError) as caught:
        find_cuda_libraries(python, {})
    assert str(caught.value) == message.format(python=python)


def test_missing_torch_or_unusable_interpreter_is_refused(tmp_path: Path) -> None:
    python = interpreter(tmp_path, torch=None)
    with pytest.raises(UserError) as caught:
        find_cuda_libraries(python, {})
    assert str(caught.value) == f"{python} has no torch: install one with CUDA 13"
    with pytest.raises(UserError, match=r"none cannot be run: No such file or directory"):
        find_cuda_libraries(tmp_path / "none", {})
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(UserError, match=r"python is not a working Python: exit 3"):
        find_cuda_libraries(broken, {})
