"""The rules against the installed library, both ways, and built caches under it: zero compiles."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEPLOYMENT = ["--model", "dsv4", "--layers", "4", "--pp", "1", "--tp", "8", "--max-tokens", "300"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runner", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_rules_are_the_librarys() -> None:
    done = run("plan", "--check", *DEPLOYMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no difference: " in done.stdout


def test_what_was_built_is_what_the_library_asks_for(tmp_path: Path) -> None:
    built = run("compile", *DEPLOYMENT, "--cache-dir", str(tmp_path))
    assert built.returncode == 0, built.stderr
    asked = run("plan", "--source", "library", "--cache-dir", str(tmp_path), *DEPLOYMENT)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert "the library asked for 0 kernels in " in asked.stdout


def test_a_missing_kernel_is_told(tmp_path: Path) -> None:
    gemm = ["--gemm", "gemm_nt_f8f8bf16:4096:1024", "--max-m", "40"]
    (tmp_path / "cache").mkdir()
    asked = run("plan", "--source", "library", "--cache-dir", str(tmp_path), *gemm)
    assert asked.returncode == 1
    assert "lacks 4 kernels that the library asks for" in asked.stderr
