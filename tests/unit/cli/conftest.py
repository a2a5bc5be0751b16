"""Fixtures for command tests: a cache, a build machine and a server's working directory."""

import os
from pathlib import Path

import pytest

from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import Manifest
from runner.kernels.installed import Library
from tests.unit.build_machine import NVCC, BuildMachine
from tests.unit.elf import tiny_cubin
from tests.unit.small_cache import fill, keys_for, small_library
from tests.unit.watched_server import MIDDLE, SERVER, SMALL


@pytest.fixture
def here(tmp_path: Path, fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """A small library and an nvcc of release 13.0 in place of what is installed."""
    library = small_library(tmp_path / "deep_gemm")
    monkeypatch.setattr("runner.target.find_library", lambda wanted: library)
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(fake_nvcc))
    return library


@pytest.fixture
def made(tmp_path: Path, here: Library) -> tuple[KernelCache, Manifest]:
    return fill(tmp_path / "made", keys_for(here))


@pytest.fixture
def directory(made: tuple[KernelCache, Manifest]) -> Path:
    return made[0].root


@pytest.fixture
def machine(tmp_path: Path, fake_library: Library) -> BuildMachine:
    (fake_library.root / "VERSION").write_text("0.1.4.post1\n")
    (fake_library.root / "__init__.py").write_text("raise RuntimeError('importing needs CUDA')\n")
    headers = fake_library.include_path / "deep_gemm"
    for name in (
        "scheduler/sm90_paged_mqa_logits.cuh",
        "impls/smxx_layout.cuh",
        "impls/sm90_fp8_gemm_1d2d.cuh",
    ):
        (headers / name).parent.mkdir(exist_ok=True)
        (headers / name).write_text("#include <deep_gemm/b.cuh>\n")
    made = BuildMachine(tmp_path)
    made.tmp.mkdir()
    folder = tmp_path / "nvcc"
    folder.mkdir()
    (folder / "nvcc").write_text(NVCC.format(here=folder))
    (folder / "nvcc").chmod(0o755)
    (folder / "kernel.cubin").write_bytes(tiny_cubin(b"code"))
    os.mkfifo(folder / "ready")
    os.mkfifo(folder / "go")
    return made


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """The server's working directory; its script and kernel sources are in the parent folder."""
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "small.cu").write_text(SMALL.kernel.body)
    (tmp_path / "middle.cu").write_text(MIDDLE.kernel.body)
    (tmp_path / "broken.cu").write_text("broken\n")
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides any GPU of the test machine."""
    monkeypatch.setattr("runner.target.device_here", lambda: None)
