"""Locks of a node's ranks: one a GEMM, gone with their holder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.locks import CompileLocks
from runner.errors import UserError
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape

DENSE = GemmShape(T.GEMM_NT_F8F8BF16, 512, 256, 1, 132)


def other(locks: CompileLocks, shape: GemmShape, within: float = 10) -> bool:
    """Whether somebody else gets the lock within some seconds."""
    got = threading.Event()

    def take() -> None:
        with locks.held(shape):
            got.set()

    threading.Thread(target=take, daemon=True).start()
    return got.wait(within)


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    mine, theirs = CompileLocks(tmp_path), CompileLocks(tmp_path)
    with mine.held(DENSE):
        assert not other(theirs, DENSE, within=0.3)
    assert other(theirs, DENSE)


@pytest.mark.parametrize(
    "shape",
    [
        GemmShape(T.GEMM_NT_BF16BF16F32, 512, 256, 1, 132),
        GemmShape(T.GEMM_NT_F8F8BF16, 640, 256, 1, 132),
        GemmShape(T.GEMM_NT_F8F8BF16, 512, 512, 1, 132),
        GemmShape(T.GEMM_NT_F8F8BF16, 512, 256, 2, 132),
    ],
    ids=["type", "n", "k", "groups"],
)
def test_each_gemm_has_its_own(shape: GemmShape, tmp_path: Path) -> None:
    locks = CompileLocks(tmp_path)
    with locks.held(DENSE):
        assert other(locks, shape)


def test_nodes_have_their_own(tmp_path: Path) -> None:
    with CompileLocks(tmp_path / "node0").held(DENSE):
        assert other(CompileLocks(tmp_path / "node1"), DENSE)


def test_an_error_lets_go(tmp_path: Path) -> None:
    locks = CompileLocks(tmp_path)
    with pytest.raises(ValueError, match="compile"), locks.held(DENSE):
        raise ValueError("compile")
    assert other(locks, DENSE)


HOLDER = """
import sys, time
from pathlib import Path
from launch.locks import CompileLocks
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape
with CompileLocks(Path(sys.argv[1])).held(GemmShape(T.GEMM_NT_F8F8BF16, 512, 256, 1, 132)):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_killed_holder_lets_go(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    locks = CompileLocks(tmp_path)
    assert not other(locks, DENSE, within=0.3)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert other(locks, DENSE)


def test_locks_are_files_beside_the_cache(tmp_path: Path) -> None:
    with CompileLocks(tmp_path).held(DENSE):
        pass
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.lock")] == [
        "locks/GEMM_NT_F8F8BF16_n512_k256_g1.lock"
    ]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        CompileLocks(tmp_path / "file")
    assert str(caught.value) == f"cannot make {tmp_path / 'file' / 'locks'}: Not a directory"
