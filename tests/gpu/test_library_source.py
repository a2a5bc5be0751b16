"""The rules and a built cache, against the library installed on a GPU machine."""

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


def test_rules_give_the_same_kernels_as_the_library() -> None:
    done = run("plan", "--check", *DEPLOYMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no difference: " in done.stdout


def test_library_compiles_nothing_on_a_built_cache(tmp_path: Path) -> None:
    built = run("compile", *DEPLOYMENT, "--cache-dir", str(tmp_path))
    assert built.returncode == 0, built.stderr
    called = run("cache", "verify", str(tmp_path), "--call")
    assert called.returncode == 0, called.stdout + called.stderr
    assert "on the GPU here: 0 compiles asked for, 0 new entries" in called.stdout
